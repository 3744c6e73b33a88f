"use strict";
// The page reads without this script. It adds tabs, values under the pointer, and the numbers behind token colours.
// Text from the run only ever reaches the page through textContent.

const tip = document.body.appendChild(document.createElement("div"));
tip.className = "tip";
tip.hidden = true;

function placeTip(x, y) {
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = x + 14 + box.width > innerWidth - 8 ? x - 14 - box.width : x + 14;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.min(Math.max(8, y - box.height - 10), innerHeight - box.height - 8)}px`;
}

function hideTip() {
  tip.hidden = true;
}

function element(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

// Tabs. The address keeps the open one, so that a link can point at it.
const tabs = [...document.querySelectorAll("[role=tab]")];
const panels = tabs.map((tab) => document.getElementById(tab.getAttribute("aria-controls")));

function showTab() {
  const open = Math.max(0, tabs.findIndex((tab) => tab.hash === location.hash));
  tabs.forEach((tab, i) => {
    tab.setAttribute("aria-selected", i === open);
    tab.tabIndex = i === open ? 0 : -1;
    panels[i].hidden = i !== open;
  });
  hideTip();
}

function goToTab(tab) {
  history.replaceState(null, "", tab.hash);
  showTab();
  const below = document.querySelector("main").getBoundingClientRect().top - tab.parentElement.offsetHeight;
  if (below < 0) scrollBy(0, below);
}

tabs.forEach((tab, i) => {
  tab.addEventListener("click", (event) => {
    event.preventDefault();
    goToTab(tab);
  });
  tab.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    const next = tabs[(i + move + tabs.length) % tabs.length];
    goToTab(next);
    next.focus();
  });
});
// 1 to 4 open a tab from anywhere.
addEventListener("keydown", (event) => {
  const tab = tabs[Number(event.key) - 1];
  if (!tab || event.ctrlKey || event.metaKey || event.altKey) return;
  goToTab(tab);
  tab.focus();
});
addEventListener("hashchange", showTab);
showTab();

// Charts: the nearest step under the pointer, or the next one with an arrow key.
for (const plot of document.querySelectorAll(".plot")) {
  const hover = JSON.parse(plot.dataset.hover);
  const rule = plot.appendChild(element("i", "rule", ""));
  rule.hidden = true;
  let index = hover.at.length - 1;

  const show = (next, y) => {
    index = Math.min(Math.max(next, 0), hover.at.length - 1);
    const box = plot.querySelector("svg").getBoundingClientRect();
    rule.hidden = false;
    rule.style.left = `${100 * hover.at[index]}%`;
    tip.replaceChildren(element("p", "tip-title", `step ${hover.x[index]}`));
    for (const [label, colour, values] of hover.series) {
      if (!values[index]) continue;
      const row = element("p", "", "");
      row.append(element("i", `key s${colour}`, ""), element("span", "", label), element("b", "", values[index]));
      tip.append(row);
    }
    placeTip(box.left + box.width * hover.at[index], y ?? box.top + box.height / 2);
  };
  const hide = () => {
    rule.hidden = true;
    hideTip();
  };
  const follow = (event) => {
    const box = plot.querySelector("svg").getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width;
    const distances = hover.at.map((a) => Math.abs(a - at));
    show(distances.indexOf(Math.min(...distances)), event.clientY);
  };
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const target = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: hover.at.length - 1 }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    show(target);
  });
}

// Filters: of the questions of a training step. A question carries the names of those that show it.
const filters = document.querySelector(".filters");
if (filters) {
  const buttons = [...filters.querySelectorAll("button")];
  const questions = [...document.querySelectorAll("details[data-kinds]")];
  filters.hidden = false;
  filters.addEventListener("click", (event) => {
    const chosen = event.target.closest("button");
    if (!chosen) return;
    const kind = chosen.dataset.filter;
    for (const button of buttons) button.setAttribute("aria-pressed", button === chosen);
    let shown = 0;
    for (const question of questions) {
      question.hidden = kind !== "" && !question.dataset.kinds.split(" ").includes(kind);
      shown += !question.hidden;
    }
    filters.querySelector("p").textContent = shown ? "" : "No question of these steps is like that.";
  });
}

// Served by `retort ui`: offer the newer page once there is one, and keep what is open until it is asked for.
if (document.body.dataset.stamp) {
  const newer = element("button", "newer", "The run went on: show it");
  newer.type = "button";
  newer.hidden = true;
  newer.addEventListener("click", () => location.reload());
  document.body.append(newer);
  setInterval(async () => {
    const answer = await fetch("stamp").catch(() => null);
    if (!answer || !answer.ok || (await answer.text()) === document.body.dataset.stamp) return;
    // Curves and lanes hold nothing that a reader would lose.
    if (["", "#curves", "#timeline"].includes(location.hash)) location.reload();
    else newer.hidden = false;
  }, 3000);
}

// Tokens: weight and policy version.
function showToken(event) {
  const token = event.target.closest("[data-m]");
  if (!token) return event.target.closest(".plot") || hideTip();
  const version = element("p", "", `sampled by policy version ${token.dataset.v}`);
  tip.replaceChildren(element("p", "tip-title", `advantage × ${token.dataset.m}`), version);
  placeTip(event.clientX, event.clientY);
}

document.addEventListener("pointerover", showToken);
document.addEventListener("pointerdown", showToken);
