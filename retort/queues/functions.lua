-- The only writer of the queue's protocol state; the states are drawn in __init__.py. Redis 7.0 and Valkey.
-- Python puts two lines before this text: the shebang with the library's name, and `local LIBRARY = '<name>'`.
-- Every function is atomic, and repeating a call changes nothing more.

local CONSUMER_GROUP = 'rollout'
local AUDIT_LENGTH = 10000

-- Every function gets the same keys, in the order of `Keys.of_functions` in protocol.py.
local function keyed(keys)
  return {
    work = {train = keys[1], validation = keys[2]},
    groups = {train = keys[3], validation = keys[4]},
    dead = keys[5],
    state = keys[6],
    fence = keys[7],
    policy = keys[8],
    members = keys[9],
    evicted = keys[10],
    drain = keys[11],
    audit = keys[12],
    history = keys[13],
    progress = keys[14],
    stop = keys[15],
  }
end

-- A monotone maximum: a Redis that forgot its last seconds learns the newest epoch again from the newest trainer.
-- What is accepted leaves a trace, by which anybody can see that no older trainer ever wrote after a newer one.
local function refuse_old_epoch(k, epoch, call)
  local highest = redis.call('GET', k.fence) or '0'
  if tonumber(epoch) < tonumber(highest) then
    return redis.error_reply('FENCED ' .. highest)
  end
  if epoch ~= highest then
    redis.call('SET', k.fence, epoch)
  end
  redis.call('XADD', k.audit, 'MAXLEN', '~', AUDIT_LENGTH, '*', 'epoch', epoch, 'call', call)
end

-- Work streams are made here and nowhere else, so a stream that exists has its consumer group.
local function ensure_consumer_group(stream)
  if redis.call('EXISTS', stream) == 0 then
    redis.call('XGROUP', 'CREATE', stream, CONSUMER_GROUP, '0', 'MKSTREAM')
  end
end

local function add(stream, group_id, crc, data)
  return redis.call('XADD', stream, '*', 'group_id', group_id, 'crc', crc, 'data', data)
end

local function history_of(stream, entry_id)
  return stream .. ' ' .. entry_id
end

local function finish_work(k, stream, entry_id)
  redis.call('XACK', stream, CONSUMER_GROUP, entry_id)
  redis.call('XDEL', stream, entry_id)
  redis.call('HDEL', k.history, history_of(stream, entry_id))
end

-- Who failed at an entry, when and why, once for each delivery: one that was given back is taken off their count, and a
-- call that is repeated finds its attempt there. So there are at most as many as deliveries.
local function note_failure(k, stream, entry_id, replica, deliveries, why)
  local field = history_of(stream, entry_id)
  local known = redis.call('HGET', k.history, field)
  local attempts = known and cmsgpack.unpack(known) or {}
  if #attempts < deliveries then
    local now = redis.call('TIME')
    table.insert(attempts, {replica = replica, at = tonumber(now[1]) + tonumber(now[2]) / 1e6, why = why})
    redis.call('HSET', k.history, field, cmsgpack.pack(attempts))
  end
end

-- A work entry exists if and only if its group's state is "issued <its id>".
local function work_of(state)
  return state and string.match(state, '^issued (.+)$')
end

-- Moves an entry to `dead`. Its group is forgotten if it is still in `state_then`, so that it can be issued again.
local function set_aside(k, kind, stream, entry_id, state_then, cause, reason)
  local entry = redis.call('XRANGE', stream, entry_id, entry_id)[1]
  if not entry then
    return 0
  end
  local group_id, data = entry[2][2], entry[2][6]
  redis.call('XADD', k.dead, '*', 'kind', kind, 'group_id', group_id, 'cause', cause, 'reason', reason,
    'epoch', redis.call('GET', k.fence) or '0', 'data', data,
    'history', redis.call('HGET', k.history, history_of(stream, entry_id)) or '')
  finish_work(k, stream, entry_id)
  if redis.call('HGET', k.state, group_id) == state_then then
    redis.call('HDEL', k.state, group_id)
  end
  return 1
end

-- The pending record of an entry, if this consumer holds its lease: {id, consumer, idle_ms, deliveries}.
local function held(stream, consumer, entry_id)
  ensure_consumer_group(stream)
  return redis.call('XPENDING', stream, CONSUMER_GROUP, entry_id, entry_id, 1, consumer)[1]
end

-- A delivery that ends by giving back is no failure of the work, so it is taken off the count; once, because a lease
-- that was let go counts as run out from then on.
local function let_go(stream, consumer, pending, lease_ms)
  if pending[3] < tonumber(lease_ms) then
    redis.call('XCLAIM', stream, CONSUMER_GROUP, consumer, 0, pending[1],
      'IDLE', lease_ms, 'RETRYCOUNT', math.max(pending[4] - 1, 0), 'JUSTID')
  end
end

local function all_pending(stream)
  ensure_consumer_group(stream)
  local count = redis.call('XPENDING', stream, CONSUMER_GROUP)[1]
  return count > 0 and redis.call('XPENDING', stream, CONSUMER_GROUP, '-', '+', count) or {}
end

-- Trainer ---------------------------------------------------------------------------------------------------------

local function open(keys, args)
  local k = keyed(keys)
  local refused = refuse_old_epoch(k, args[1], 'open')
  return refused or 'OK'
end

-- epoch, then for every item: kind, group_id, crc, data. Answers "new" or the state it found, for every item.
local function issue(keys, args)
  local k = keyed(keys)
  local refused = refuse_old_epoch(k, args[1], 'issue')
  if refused then return refused end
  local found = {}
  for i = 2, #args, 4 do
    local kind, group_id, crc, data = args[i], args[i + 1], args[i + 2], args[i + 3]
    local state = redis.call('HGET', k.state, group_id)
    if state then
      table.insert(found, work_of(state) and 'issued' or state)
    else
      ensure_consumer_group(k.work[kind])
      redis.call('HSET', k.state, group_id, 'issued ' .. add(k.work[kind], group_id, crc, data))
      table.insert(found, 'new')
    end
  end
  return found
end

-- Members of whom nothing was heard for so long are gone for good: names of pods do not come back, and would pile up
-- in what everybody reads every second. Who loads its engine says so once and takes minutes.
-- One that is there after all announces itself again.
local FORGET_AFTER_S = 3600

local function forget_the_lost(k)
  local now = tonumber(redis.call('TIME')[1])
  local members = redis.call('HGETALL', k.members)
  for i = 1, #members, 2 do
    local heard = tonumber(string.match(members[i + 1], '^([%d.]+) '))
    if heard and now - heard > FORGET_AFTER_S then redis.call('HDEL', k.members, members[i]) end
  end
end

-- epoch, version, digest
local function publish(keys, args)
  local k = keyed(keys)
  local refused = refuse_old_epoch(k, args[1], 'publish')
  if refused then return refused end
  local now = redis.call('HMGET', k.policy, 'epoch', 'version')
  if now[1] == args[1] and tonumber(args[2]) < tonumber(now[2]) then
    return redis.error_reply('ERR policy version ' .. args[2] .. ' is older than the committed ' .. now[2])
  end
  redis.call('HSET', k.policy, 'epoch', args[1], 'version', args[2], 'digest', args[3])
  forget_the_lost(k)
  return 'OK'
end

-- epoch, kind, then for every group: entry_id, group_id. The only place where groups leave, by exact id.
local function commit(keys, args)
  local k = keyed(keys)
  local refused = refuse_old_epoch(k, args[1], 'commit')
  if refused then return refused end
  local removed = 0
  for i = 3, #args, 2 do
    removed = removed + redis.call('XDEL', k.groups[args[2]], args[i])
    -- A Redis that forgot the submit still has the work, which nobody needs any more.
    local work = work_of(redis.call('HGET', k.state, args[i + 1]))
    if work then finish_work(k, k.work[args[2]], work) end
    redis.call('HDEL', k.state, args[i + 1])
  end
  return removed
end

-- epoch, kind. Forgets everything of a kind, work and groups; work that is leased now will be answered with "unknown".
local function withdraw(keys, args)
  local k = keyed(keys)
  local refused = refuse_old_epoch(k, args[1], 'withdraw')
  if refused then return refused end
  local removed = 0
  -- Entry by entry: deleting the stream would break the reads of replicas that are waiting at it.
  for _, stream in ipairs({k.work[args[2]], k.groups[args[2]]}) do
    for _, entry in ipairs(redis.call('XRANGE', stream, '-', '+')) do
      redis.call('HDEL', k.state, entry[2][2])
      redis.call('XDEL', stream, entry[1])
      redis.call('HDEL', k.history, history_of(stream, entry[1]))
      removed = removed + 1
    end
  end
  for _, pending in ipairs(all_pending(k.work[args[2]])) do
    redis.call('XACK', k.work[args[2]], CONSUMER_GROUP, pending[1])
  end
  return removed
end

-- epoch, step. Forgets training work of later steps, which a trainer that died had issued: replicas that cannot sample
-- it yet would hold it instead of the work that is wanted first. Groups that are finished stay.
local function withdraw_later(keys, args)
  local k = keyed(keys)
  local refused = refuse_old_epoch(k, args[1], 'withdraw_later')
  if refused then return refused end
  local removed = 0
  for _, entry in ipairs(redis.call('XRANGE', k.work.train, '-', '+')) do
    local readable, item = pcall(cmsgpack.unpack, entry[2][6])
    if readable and item.step > tonumber(args[2]) then
      ensure_consumer_group(k.work.train)
      finish_work(k, k.work.train, entry[1])
      redis.call('HDEL', k.state, entry[2][2])
      removed = removed + 1
    end
  end
  return removed
end

-- epoch, kind, entry_id, cause, reason
local function quarantine(keys, args)
  local k = keyed(keys)
  local refused = refuse_old_epoch(k, args[1], 'quarantine')
  if refused then return refused end
  return set_aside(k, args[2], k.groups[args[2]], args[3], 'submitted', args[4], args[5])
end

-- epoch, replica, incarnation
local function evict(keys, args)
  local k = keyed(keys)
  local refused = refuse_old_epoch(k, args[1], 'evict')
  if refused then return refused end
  redis.call('HSET', k.evicted, args[2], args[3])
  -- Its supervisor may have started another in the meantime, which is not to blame.
  local member = redis.call('HGET', k.members, args[2])
  local readable, known = pcall(cmsgpack.unpack, member and string.match(member, '^[%d.]+ (.*)$') or member)
  if readable and type(known) == 'table' and known.incarnation == args[3] then
    redis.call('HDEL', k.members, args[2])
  end
  return 'OK'
end

-- Operator --------------------------------------------------------------------------------------------------------

-- entry_id, crc. Answers 1 if the work is in its queue again; 0 if its group is awaited or there already.
local function replay(keys, args)
  local k = keyed(keys)
  local entry = redis.call('XRANGE', k.dead, args[1], args[1])[1]
  if not entry then return 0 end
  local kind, group_id, data = entry[2][2], entry[2][4], entry[2][12]
  local is_known = redis.call('HGET', k.state, group_id)
  if not is_known then
    ensure_consumer_group(k.work[kind])
    redis.call('HSET', k.state, group_id, 'issued ' .. add(k.work[kind], group_id, args[2], data))
  end
  redis.call('XDEL', k.dead, args[1])
  return is_known and 0 or 1
end

-- Rollout service -------------------------------------------------------------------------------------------------

local function declare(keys)
  for _, stream in pairs(keyed(keys).work) do
    ensure_consumer_group(stream)
  end
  return 'OK'
end

-- consumer, limit, lease_ms, max_deliveries. Answers {kind, entry_id, deliveries, group_id, crc, data} for every lease.
local function take(keys, args)
  local k = keyed(keys)
  local consumer, limit, lease_ms, max_deliveries = args[1], tonumber(args[2]), args[3], tonumber(args[4])
  local leases = {}
  local function lease(kind, entry, deliveries)
    table.insert(leases, {kind, entry[1], deliveries, entry[2][2], entry[2][4], entry[2][6]})
  end
  local function reclaim_expired(kind, stream)
    local expired = redis.call('XPENDING', stream, CONSUMER_GROUP, 'IDLE', lease_ms, '-', '+', limit - #leases)
    for _, pending in ipairs(expired) do
      local entry_id, holder, deliveries = pending[1], pending[2], pending[4]
      note_failure(k, stream, entry_id, holder, deliveries, 'its lease ran out')
      if deliveries >= max_deliveries then
        set_aside(k, kind, stream, entry_id, 'issued ' .. entry_id, 'failed',
          'handed out ' .. deliveries .. ' times and never finished, last by ' .. holder)
      else
        local entry = redis.call('XCLAIM', stream, CONSUMER_GROUP, consumer, 0, entry_id)[1]
        if entry then lease(kind, entry, deliveries + 1) end
      end
    end
  end
  local function read_new(kind, stream)
    local reply = redis.call('XREADGROUP', 'GROUP', CONSUMER_GROUP, consumer, 'COUNT', limit - #leases,
      'STREAMS', stream, '>')
    for _, entry in ipairs(reply and reply[1][2] or {}) do
      lease(kind, entry, 1)
    end
  end
  for _, kind in ipairs({'train', 'validation'}) do
    local stream = k.work[kind]
    ensure_consumer_group(stream)
    if #leases < limit then reclaim_expired(kind, stream) end
    if #leases < limit then read_new(kind, stream) end
  end
  return leases
end

-- consumer, then for every lease: kind, entry_id. Answers the entry ids that are not (or no longer) this consumer's.
local function renew(keys, args)
  local k = keyed(keys)
  local lost = {}
  for i = 2, #args, 2 do
    local stream = k.work[args[i]]
    if held(stream, args[1], args[i + 1]) then
      redis.call('XCLAIM', stream, CONSUMER_GROUP, args[1], 0, args[i + 1], 'JUSTID')
    else
      table.insert(lost, args[i + 1])
    end
  end
  return lost
end

-- kind, entry_id, group_id, crc, data. A lease that has run out may still submit: the first answer counts.
local function submit(keys, args)
  local k = keyed(keys)
  local kind, entry_id, group_id = args[1], args[2], args[3]
  local state = redis.call('HGET', k.state, group_id)
  local work = work_of(state)
  if work then
    add(k.groups[kind], group_id, args[4], args[5])
    redis.call('HSET', k.state, group_id, 'submitted')
    finish_work(k, k.work[kind], work)
    return 'stored'
  end
  -- The group is compared because an emptied Redis may have given the entry id to another.
  local entry = redis.call('XRANGE', k.work[kind], entry_id, entry_id)[1]
  if entry and entry[2][2] == group_id then
    finish_work(k, k.work[kind], entry_id)
  end
  return state and 'duplicate' or 'unknown'
end

-- kind, entry_id, consumer, lease_ms
local function give_back(keys, args)
  local stream = keyed(keys).work[args[1]]
  local pending = held(stream, args[3], args[2])
  if pending then let_go(stream, args[3], pending, args[4]) end
  return pending and 1 or 0
end

-- kind, entry_id, consumer, reason. The lease goes on: it runs out, and the next may try.
local function fail(keys, args)
  local k = keyed(keys)
  local stream = k.work[args[1]]
  local pending = held(stream, args[3], args[2])
  if pending then note_failure(k, stream, args[2], args[3], pending[4], args[4]) end
  return pending and 1 or 0
end

-- kind, entry_id, consumer, cause, reason. Also by one whose lease has run out: the work is as bad as it says.
local function bury(keys, args)
  local k = keyed(keys)
  local kind, entry_id, consumer, cause, reason = unpack(args)
  local stream = k.work[kind]
  ensure_consumer_group(stream)
  local pending = redis.call('XPENDING', stream, CONSUMER_GROUP, entry_id, entry_id, 1)[1]
  if pending then note_failure(k, stream, entry_id, consumer, pending[4], reason) end
  return set_aside(k, kind, stream, entry_id, 'issued ' .. entry_id, cause, reason)
end

-- replica, incarnation, member. Answers whether the operator wants the replica to work on or to leave.
-- The time stands before it, because the clocks of two hosts need not agree; this one's is everybody's.
local function announce(keys, args)
  local k = keyed(keys)
  if redis.call('HGET', k.evicted, args[1]) == args[2] then
    return redis.error_reply('EVICTED')
  end
  local now = redis.call('TIME')
  redis.call('HSET', k.members, args[1], string.format('%d.%06d ', now[1], now[2]) .. args[3])
  return redis.call('HGET', k.drain, args[1]) == args[2] and 'drain' or 'ok'
end

-- consumer, lease_ms. The consumer itself stays in its group: deleting it would delete its leases with it.
local function leave(keys, args)
  local k = keyed(keys)
  for _, stream in pairs(k.work) do
    ensure_consumer_group(stream)
    local count = redis.call('XPENDING', stream, CONSUMER_GROUP)[1]
    if count > 0 then
      for _, pending in ipairs(redis.call('XPENDING', stream, CONSUMER_GROUP, '-', '+', count, args[1])) do
        let_go(stream, args[1], pending, args[2])
      end
    end
  end
  redis.call('HDEL', k.members, args[1])
  return 'OK'
end

-- Operator --------------------------------------------------------------------------------------------------------

-- replica, incarnation. Its next process, which has another incarnation, is not meant.
local function drain(keys, args)
  redis.call('HSET', keyed(keys).drain, args[1], args[2])
  return 'OK'
end

-- Progress and the request to stop -----------------------------------------------------------------------------------

-- field, value, ...
local function set_progress(keys, args)
  return redis.call('HSET', keyed(keys).progress, unpack(args))
end

-- reason
local function stop(keys, args)
  return redis.call('SET', keyed(keys).stop, args[1])
end

-- More work: refused by a server at its memory limit. It waits until groups have left.
redis.register_function(LIBRARY .. '_issue', issue)
redis.register_function(LIBRARY .. '_replay', replay)

-- What ends work, or stays as long as it is, goes on there: without it nothing would ever leave.
local function goes_on(name, callback)
  redis.register_function({function_name = LIBRARY .. '_' .. name, callback = callback, flags = {'allow-oom'}})
end
goes_on('open', open)
goes_on('publish', publish)
goes_on('commit', commit)
goes_on('withdraw', withdraw)
goes_on('withdraw_later', withdraw_later)
goes_on('quarantine', quarantine)
goes_on('evict', evict)
goes_on('declare', declare)
goes_on('take', take)
goes_on('renew', renew)
goes_on('submit', submit)
goes_on('give_back', give_back)
goes_on('fail', fail)
goes_on('bury', bury)
goes_on('announce', announce)
goes_on('leave', leave)
goes_on('drain', drain)
goes_on('set_progress', set_progress)
goes_on('stop', stop)
