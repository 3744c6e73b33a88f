"""Questions with their completions. Everything here was written by a model or a data file: every text is escaped."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from retort.cli.report.charts import number
from retort.cli.report.run_files import GivenUpLine, GroupLine, RolloutLine, Run, TrainingStep, Validation

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LEVELS = (0.05, 0.15, 0.35, 0.6, 0.9)
"""Where the five shades begin, as shares of the largest change that the method allows."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_SIBLINGS = 16


@dataclass(frozen=True)
class Detail:
    """How much of the completions is shown."""

    questions: int
    """Of a training step."""
    tokens: int
    """Longer completions lose their middle."""
    weighted: int
    """Questions of a training step whose completions show the weight of every token."""


@dataclass(frozen=True)
class Style:
    """How completions of this run are shown."""

    tokenizer: "Tokenizer | None"
    weight_range: float
    """Largest change of a token's weight, lambda * eps_w."""
    success: float
    """A completion with at least this reward counts as right."""
    detail: Detail
    longest: int
    """A question with a completion of more tokens is among the tenth with the longest."""


def style_of(run: Run, detail: Detail) -> Style:
    method = run.config.method if run.config else None
    return Style(
        tokenizer=load_tokenizer(*([Path(run.config.model.path)] if run.config else []), run.directory / "hf"),
        weight_range=method.reweight_lambda * method.reweight_clip if method else 0.1,
        success=method.success_threshold if method else 0.5,
        detail=detail,
        longest=_longest_tenth(run, detail),
    )


def _longest_tenth(run: Run, detail: Detail) -> int:
    lengths = sorted(_longest(group) for training in run.training for group in training.groups[: detail.questions])
    return lengths[-1 - max(1, len(lengths) // 10)] if len(lengths) > 1 else 0


def _longest(group: GroupLine) -> int:
    return max((len(rollout.completion_ids) for rollout in group.rollouts), default=0)


def load_tokenizer(*directories: Path) -> "Tokenizer | None":
    """The first there is. Without one, or without the library, the page shows texts but not the weights of tokens."""
    files = [file for directory in directories if (file := directory / "tokenizer.json").is_file()]
    if not files:
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    return Tokenizer.from_file(str(files[0]))


def completions(run: Run, style: Style) -> str:
    """The rollouts tab: validation before and after, then the first and the last training step."""
    parts = [_validation(run.validations, style)] if run.validations else []
    if run.training or run.given_up:
        parts.append(_filters(run, style))
    for index, training in enumerate(run.training):
        shown = training.groups[: style.detail.questions]
        title = (
            f"Training, step {training.step} <small>{len(shown)} of its first {len(training.groups)} questions</small>"
        )
        lead = _training_lead(training, style) if index == 0 else ""
        questions = "".join(_training_question(i, group, style) for i, group in enumerate(shown))
        parts.append(f'<section><h2>{title}</h2>{lead}<div class="questions">{questions}</div></section>')
    if run.given_up:
        parts.append(_given_up(run.given_up))
    return "".join(parts) or '<p class="empty">No group has been finished yet.</p>'


UNSCORABLE = "unscorable"
KINDS = {
    "wrong": "with a wrong completion",
    "uniform": "zero variance",
    "longest": "longest tenth",
    "unread": "no answer read",
    UNSCORABLE: "unscorable",
}
"""Filter -> what its button says."""


def kinds_of(group: GroupLine, style: Style) -> list[str]:
    """Which filters show this question."""
    kinds = {
        "wrong": any(reward < style.success for reward in group.rewards),
        "uniform": len(set(group.rewards)) == 1,
        "longest": _longest(group) > style.longest,
        "unread": any(not rollout.format_ok for rollout in group.rollouts),
    }
    return [kind for kind, applies in kinds.items() if applies]


def _filters(run: Run, style: Style) -> str:
    shown = [group for training in run.training for group in training.groups[: style.detail.questions]]
    counts = Counter(kind for group in shown for kind in kinds_of(group, style))
    counts[UNSCORABLE] = len(run.given_up)
    everything = len(shown) + len(run.given_up)
    buttons = "".join(
        f'<button type="button" data-filter="{kind}" aria-pressed="false">{text} <b>{counts[kind]}</b></button>'
        for kind, text in KINDS.items()
    )
    return (
        '<div class="filters" role="group" aria-label="Training questions to show" hidden>'
        "<span>Training questions</span>"
        f'<button type="button" data-filter="" aria-pressed="true">all <b>{everything}</b></button>{buttons}'
        '<p class="empty" role="status"></p></div>'
    )


def _training_lead(training: TrainingStep, style: Style) -> str:
    text = (
        "Questions of the step, those with right and wrong completions first, since only they teach: "
        "a completion’s <b>advantage</b> is its reward minus the mean of its siblings."
    )
    if not any(rollout.token_weights for group in training.groups for rollout in group.rollouts):
        return f'<p class="lead">{text}</p>'
    if style.tokenizer is None:
        return f'<p class="lead">{text} Token weights are not shown, because the tokenizer was not found.</p>'
    text += (
        " The teacher, which has seen a right sibling (the <b>demonstration</b>), then moves credit between tokens. "
        "A token underlined in full counts more, with dots less, and its colour says how much, "
        f"in the first {style.detail.weighted} questions of each step. Point at a token for its number."
    )
    return f'<p class="lead">{text}</p>{_legend(style.weight_range)}'


def _given_up(groups: Sequence[GivenUpLine]) -> str:
    lead = (
        "A completion that nobody could score has no reward, not a reward of 0, so its group was set aside and the run "
        "ended, naming it; so it does with work that failed too often. A resumed run asks for the group again."
    )
    questions = "".join(
        f'<details data-kinds="{UNSCORABLE}" open><summary><span class="title">{_title(group.question)}</span>'
        f"</summary>{_prompt(group)}{_reason(group)}</details>"
        for group in groups
    )
    return f'<section><h2>Given up</h2><p class="lead">{lead}</p><div class="questions">{questions}</div></section>'


def _reason(group: GivenUpLine) -> str:
    return f'<div class="prompt"><pre>{escape(f"group {group.group_id}: {_short(group.reason, 2000)}")}</pre></div>'


def _legend(weight_range: float) -> str:
    def swatch(name: str, share: float) -> str:
        return f'<i class="{name}">{1 + share * weight_range:.3f}</i>'

    down = "".join(swatch(f"d{level}", -LEVELS[level - 1]) for level in range(5, 0, -1))
    up = "".join(swatch(f"u{level}", LEVELS[level - 1]) for level in range(1, 6))
    return (
        f'<p class="weights"><span>less, down to × {1 - weight_range:.2g}</span>'
        f"<code>{down}<i>1</i>{up}</code><span>more, up to × {1 + weight_range:.2g}</span></p>"
    )


def _training_question(index: int, group: GroupLine, style: Style) -> str:
    if index >= style.detail.weighted:
        style = replace(style, tokenizer=None)
    shown = group.rollouts[:MAX_SIBLINGS]
    uses = Counter(r.demonstration for r in group.rollouts if r.demonstration is not None)
    cards = "".join(_completion(i, r, style, uses[i]) for i, r in enumerate(shown))
    left_out = len(group.rollouts) - len(shown)
    note = f"<p class=empty>{left_out} more completions are in the run’s files.</p>" if left_out else ""
    body = f'<div class="siblings">{cards}</div>{note}'
    return _question(group, _marks(group, style), body, index == 0, kinds_of(group, style))


def _completion(index: int, rollout: RolloutLine, style: Style, uses: int) -> str:
    right = rollout.reward >= style.success
    facts = [("answer", escape(_short(rollout.parsed)) or "–"), ("reward", number(rollout.reward))]
    if rollout.advantage is not None:
        facts.append(("advantage", f"{rollout.advantage:+.3f}".replace("-", "−")))
    shown = "".join(f"<span>{name} <b>{value}</b></span>" for name, value in facts)
    notes = [f"{len(rollout.completion_ids):,} tokens", _versions(rollout.policy_versions)]
    if rollout.finish_reason == "length":
        notes.append("cut off at the limit")
    if uses:
        notes.append(f"<b>demonstration</b> for {uses} sibling{'s' if uses > 1 else ''}")
    if rollout.demonstration is not None:
        notes.append(f"teacher saw #{rollout.demonstration + 1}")
    elif rollout.advantage:
        notes.append("no demonstration: plain advantage")
    return (
        f'<article class="{"right" if right else "wrong"}"><header><b>#{index + 1}</b> {_verdict(right)} '
        f"{shown}</header><pre>{_tokens(rollout, style)}</pre><footer>{' · '.join(notes)}</footer></article>"
    )


def _tokens(rollout: RolloutLine, style: Style) -> str:
    """The completion with its token weights, or its plain text where these or a tokenizer are missing."""
    weights, ids = rollout.token_weights, rollout.completion_ids
    if style.tokenizer is None or weights is None or not len(ids) == len(weights) == len(rollout.policy_versions):
        return escape(_without_middle(rollout.text, 4 * style.detail.tokens))
    half = style.detail.tokens // 2
    if len(ids) <= style.detail.tokens:
        return "".join(_marked(style, ids, weights, rollout.policy_versions))
    head = "".join(_marked(style, ids[:half], weights[:half], rollout.policy_versions[:half]))
    tail = "".join(_marked(style, ids[-half:], weights[-half:], rollout.policy_versions[-half:]))
    return f"{head}<em> … {len(ids) - 2 * half:,} tokens left out … </em>{tail}"


def _marked(style: Style, ids: Sequence[int], weights: Sequence[float], versions: Sequence[int]) -> Iterator[str]:
    assert style.tokenizer is not None
    texts = token_texts(style.tokenizer, ids)
    for text, weight, version in zip(texts, weights, versions, strict=True):
        if text:
            name = shade(weight, style.weight_range)
            yield f'<i{f" class={name}" if name else ""} data-m="{weight:.3f}" data-v="{version}">{escape(text)}</i>'


def token_texts(tokenizer: "Tokenizer", ids: Sequence[int]) -> list[str]:
    """Text of each token. Where a character spans several tokens the last of them carries it, the others are empty."""
    texts: list[str] = []
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=False)
        # UTF-8 needs at most four bytes for a character, so a longer wait is for something that is not one.
        complete = not text.endswith(REPLACEMENT) or len(pending) == 4
        texts.append(text if complete else "")
        if complete:
            pending.clear()
    if pending:
        texts[-1] = tokenizer.decode(pending, skip_special_tokens=False)
    return texts


def shade(weight: float, weight_range: float) -> str:
    """Style class of a token weight: u1..u5 for more credit, d1..d5 for less, empty for next to no change."""
    share = abs(weight - 1) / weight_range if weight_range else 0.0
    level = sum(share >= start for start in LEVELS)
    return f"{'u' if weight > 1 else 'd'}{level}" if level else ""


def _validation(validations: Sequence[Validation], style: Style) -> str:
    before, after = validations[0], validations[-1]
    lead = (
        "Questions at even distances through the validation file, not chosen by their result. "
        "Completions that are the same word for word stand together, with their number in front."
    )
    questions: list[str] = []
    for index, group in before.shown.items():
        moments = {v.version: v.shown[index] for v in (before, after) if index in v.shown}
        columns = "".join(
            f"<div><h4>Policy version {version} {_marks(g, style)}</h4>{_distinct(g, style)}</div>"
            for version, g in moments.items()
        )
        rates = " → ".join(f"{_share_right(g, style):.0%}" for g in moments.values())
        first = not questions
        questions.append(_question(group, f"<span>{rates}</span>", f'<div class="moments">{columns}</div>', first))
    return (
        f'<section><h2>Validation, before and after</h2><p class="lead">{lead}</p>'
        f'<div class="questions">{"".join(questions)}</div></section>'
    )


def _distinct(group: GroupLine, style: Style) -> str:
    """All completions of a group; equal ones as one entry, the most frequent first."""
    counts = Counter((r.text, r.parsed, r.reward) for r in group.rollouts)
    entries = []
    for (text, parsed, reward), count in counts.most_common():
        right = reward >= style.success
        entries.append(
            f'<article class="{"right" if right else "wrong"}"><header><b>{count} ×</b> {_verdict(right)} '
            f"<span>answer <b>{escape(_short(parsed)) or '–'}</b></span></header>"
            f"<pre>{escape(_without_middle(text, 4 * style.detail.tokens))}</pre></article>"
        )
    return "".join(entries)


def _question(group: GroupLine, badge: str, body: str, first: bool, kinds: Sequence[str] | None = None) -> str:
    marks = (' data-kinds="' + " ".join(kinds) + '"' if kinds is not None else "") + (" open" if first else "")
    return (
        f'<details{marks}><summary><span class="title">{_title(group.question)}</span>{badge}</summary>'
        f"{_prompt(group)}{body}</details>"
    )


def _title(question: str) -> str:
    return escape(_short(question.strip().split("\n")[0], 110))


def _prompt(group: GroupLine | GivenUpLine) -> str:
    return (
        f'<div class="prompt"><pre>{escape(_without_middle(group.question, 4000))}</pre>'
        f"<p>right answer <b>{escape(_short(group.answer))}</b></p></div>"
    )


def _marks(group: GroupLine, style: Style) -> str:
    right = [reward >= style.success for reward in group.rewards]
    marks = "".join(f'<i class="{"right" if r else "wrong"}">{"✓" if r else "✗"}</i>' for r in right)
    return f'<span class="marks" role="img" aria-label="{sum(right)} of {len(right)} right">{marks}</span>'


def _verdict(right: bool) -> str:
    return '<span class="verdict">✓ right</span>' if right else '<span class="verdict">✗ wrong</span>'


def _share_right(group: GroupLine, style: Style) -> float:
    return sum(reward >= style.success for reward in group.rewards) / max(1, len(group.rewards))


def _versions(versions: Sequence[int]) -> str:
    """Which policy versions sampled the completion, and where one took over from another."""
    if len(set(versions)) == 1:
        return f"policy version {versions[0]}"
    last = [i for i, version in enumerate(versions) if i + 1 == len(versions) or versions[i + 1] != version]
    return "policy version " + ", then ".join(f"{versions[i]} to token {i + 1:,}" for i in last)


def _short(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _without_middle(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    return f"{text[: length // 2]} … {len(text) - length:,} characters left out … {text[-(length // 2) :]}"
