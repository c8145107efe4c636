"""What runs inside Redis: each step that must not be torn, and the look-up, which then takes one round trip.

Redis 6.2 or later, any Valkey. Keys lie under one prefix P. An *incarnation* is EPOCH (20 digits), GENERATION (12
digits, the number of the reset it began with), NODE_ID: fixed widths, so that Lua cuts it with `sub` and compares
epochs, which are too large for its numbers, as text.

    P:k:KEY        hash   tier letter + incarnation -> size     who holds KEY
    P:held:INC     hash   KEY + tier letter -> size             what an incarnation holds: for watchers and for sweeping
    P:node:ID      hash   epoch, gen, seq, info, heard          the last said of a node
    P:alive:ID     string EPOCH GENERATION, expires             it lives; an entry of another incarnation is void
    P:members      set    of node ids
    P:void         set    of incarnations that wait to be swept
    P:stream       stream epoch, seq, reset, node, events       for watchers; a bounded number of updates

Events are packed one after the other: length of the key (1 byte), key, tier letter, size (15 digits).

Others can write to this Redis, too. A key of another type, or larger than any of ours, is dropped; a record of a node
that is none is forgotten, and the node says everything again. Time is Redis's own, and only differences count.
"""

PREFIX = "tandem:kvdir"
EPOCH_DIGITS, GENERATION_DIGITS, SIZE_DIGITS = 20, 12, 15
MAX_MEMBERS = 4096
"""Nodes. A set with more was not made by us: living nodes enter a new one within a beat."""
MAX_HOLDERS = 1024
"""Entries of one key."""

_SAFE = f"""
local P = KEYS[1]
local most_members, most_holders = {MAX_MEMBERS}, {MAX_HOLDERS}
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1e6

-- Makes sure that `key` is of this type, or is not there.
local function sound(key, kind)
  local found = redis.call('TYPE', key).ok
  if found ~= 'none' and found ~= kind then redis.call('UNLINK', key) end
end

-- EPOCH GENERATION of the node if it lives.
local function living(node)
  local key = P .. ':alive:' .. node
  local found = redis.pcall('GETRANGE', key, 0, 40)
  if type(found) ~= 'string' or #found ~= 32 then return nil end
  local left = redis.call('PTTL', key)
  if left < 0 or left > 60000 then return nil end
  return found
end
"""

# The node, as it was last heard. A later epoch makes the entries of an earlier one void, and the other way round once
# the later one has been silent: a clock may have been set back.
_COMMON = (
    _SAFE
    + """
local node, epoch = ARGV[1], ARGV[2]
local record, members, void_set = P .. ':node:' .. node, P .. ':members', P .. ':void'
sound(record, 'hash')
sound(members, 'set')
sound(void_set, 'set')

local function void(gen, old)
  redis.call('SADD', void_set, old .. gen .. node)
end
local function alive(gen, ttl)
  redis.call('SET', P .. ':alive:' .. node, epoch .. gen, 'PX', ttl)
  if redis.call('SCARD', members) > most_members then redis.call('UNLINK', members) end
  redis.call('SADD', members, node)
end

local known = redis.call('HMGET', record, 'epoch', 'gen', 'seq')
local old, gen, seq = known[1], known[2], tonumber(known[3] or '')
if old and not (#old == 20 and string.find(old, '^%d+$') and gen and #gen == 12 and string.find(gen, '^%d+$')
    and seq and seq >= 0 and seq < 1e11 and seq % 1 == 0) then
  redis.call('UNLINK', record)
  old, gen = nil, nil
end
if not old then seq = 0 end
local superseded = old and old > epoch and living(node) == old .. gen
"""
)

# ARGV: node, epoch, seq, info, ttl in ms. Returns verdict, seq.
ANNOUNCE = (
    _COMMON
    + """
if superseded then return {'superseded', seq} end
if old ~= epoch then
  if old then void(gen, old) end
  gen, seq = string.rep('0', 12), 0
  redis.call('HSET', record, 'epoch', epoch, 'gen', gen, 'seq', 0)
end
redis.call('HSET', record, 'info', ARGV[4], 'heard', string.format('%.3f', now))
alive(gen, ARGV[5])
if seq == tonumber(ARGV[3]) then return {'ok', seq} end
return {'resync', seq}
"""
)

# ARGV: node, epoch, seq, reset, events, ttl in ms, longest stream. Returns verdict, seq.
APPLY = (
    _COMMON
    + """
local number, reset, events = tonumber(ARGV[3]), ARGV[4] == '1', ARGV[5]
if superseded then return {'superseded', seq} end
if old ~= epoch then return {'resync', 0} end
if number <= seq then return {'ok', seq} end
if reset then
  void(gen, old)
  gen = string.format('%012d', number)
elseif number ~= seq + 1 then
  return {'resync', seq}
end
local incarnation = epoch .. gen .. node
local held, stream = P .. ':held:' .. incarnation, P .. ':stream'
sound(held, 'hash')
sound(stream, 'stream')
local at, last = 1, #events
while at <= last do
  local length = string.byte(events, at)
  local key = string.sub(events, at + 1, at + length)
  local tier = string.sub(events, at + length + 1, at + length + 1)
  local size = tonumber(string.sub(events, at + length + 2, at + length + 16))
  at = at + length + 17
  local holders = P .. ':k:' .. key
  if size > 0 then
    local text = string.format('%.0f', size)
    local done = redis.pcall('HSET', holders, tier .. incarnation, text)
    if type(done) == 'table' then
      redis.call('UNLINK', holders)
      redis.call('HSET', holders, tier .. incarnation, text)
    end
    redis.call('HSET', held, key .. tier, text)
  else
    redis.pcall('HDEL', holders, tier .. incarnation)
    redis.call('HDEL', held, key .. tier)
  end
end
redis.call('HSET', record, 'gen', gen, 'seq', number)
alive(gen, ARGV[6])
local function tell()
  return redis.pcall('XADD', stream, 'MAXLEN', '~', ARGV[7], '*',
    'node', node, 'epoch', epoch, 'seq', number, 'reset', ARGV[4], 'events', events)
end
if type(tell()) == 'table' then  -- somebody has used up its ids
  redis.call('UNLINK', stream)
  tell()
end
return {'ok', number}
"""
)

# ARGV: node, epoch, seconds since the last sign of life after which it is buried ('' if the node itself leaves).
# Returns 1 if done.
BURY = (
    _COMMON
    + """
if old and old ~= epoch then return 0 end
if ARGV[3] ~= '' then
  local heard = tonumber(redis.call('HGET', record, 'heard') or '') or 0
  local ago = now - heard
  if living(node) or (ago >= 0 and ago < tonumber(ARGV[3])) then return 0 end
end
if old then void(gen, old) end
redis.call('DEL', record, P .. ':alive:' .. node)
redis.call('SREM', members, node)
return 1
"""
)

# KEYS: the prefix, then the keys looked up. Returns per key: field, size, field, size, ... of live incarnations.
LOOKUP = (
    _SAFE
    + """
local prefix = P .. ':k:'
local live, out = {}, {}  -- fields repeat from key to key: each is cut once
for i = 2, #KEYS do
  local holders = prefix .. KEYS[i]
  local count = redis.pcall('HLEN', holders)
  local found = {}
  if type(count) == 'table' or count > most_holders then
    redis.call('UNLINK', holders)
  elseif count > 0 then
    found = redis.call('HGETALL', holders)
  end
  local all = true
  for j = 1, #found, 2 do
    local field = found[j]
    local is_live = live[field]
    if is_live == nil then
      is_live = #field > 33 and #field <= 400 and living(string.sub(field, 34)) == string.sub(field, 2, 33)
      live[field] = is_live
    end
    all = all and is_live
  end
  if not all then
    local kept = {}
    for j = 1, #found, 2 do
      if live[found[j]] then
        kept[#kept + 1] = found[j]
        kept[#kept + 1] = found[j + 1]
      end
    end
    found = kept
  end
  out[i - 1] = found
end
return out
"""
)

# Returns for every member: node, epoch, gen, seq, info, seconds since it was heard, 1 if it lives. Members of whom
# nothing is known are taken out. 0 instead: the set is none of ours, ask again when the nodes have made another.
STATES = (
    _SAFE
    + """
local members = P .. ':members'
sound(members, 'set')
if redis.call('SCARD', members) > most_members then return 0 end
local out = {}
for _, node in ipairs(redis.call('SMEMBERS', members)) do
  local it = #node <= 300 and redis.pcall('HMGET', P .. ':node:' .. node, 'epoch', 'gen', 'seq', 'info', 'heard') or {}
  if it[1] and it[2] and it[4] and #it[4] <= 10000 then
    local ago = now - (tonumber(it[5] or '') or 0)
    if not (ago >= 0 and ago < 1e9) then ago = 1e9 end
    local lives = living(node) == it[1] .. it[2]
    out[#out + 1] = {node, it[1], it[2], it[3] or '', it[4], string.format('%.3f', ago), lives and 1 or 0}
  else
    redis.call('SREM', members, node)
  end
end
return out
"""
)

# Takes back up to ARGV[1] entries of some void incarnation, and those of ARGV[2] others that hold nothing. Returns 1
# while something may be left.
SWEEP = (
    _SAFE
    + """
local void_set = P .. ':void'
sound(void_set, 'set')
for _, incarnation in ipairs(redis.call('SRANDMEMBER', void_set, ARGV[2])) do
  local held = P .. ':held:' .. incarnation
  sound(held, 'hash')
  local node = string.sub(incarnation, 33)
  local now_is = redis.pcall('HMGET', P .. ':node:' .. node, 'epoch', 'gen')
  local current = now_is[1] and now_is[2] and now_is[1] .. now_is[2] == string.sub(incarnation, 1, 32)
  if current or redis.call('EXISTS', held) == 0 then
    redis.call('SREM', void_set, incarnation)
  else
    local fields = redis.call('HRANDFIELD', held, ARGV[1])
    for _, field in ipairs(fields) do
      redis.pcall('HDEL', P .. ':k:' .. string.sub(field, 1, -2), string.sub(field, -1) .. incarnation)
    end
    redis.call('HDEL', held, unpack(fields))
    return 1
  end
end
return redis.call('SCARD', void_set) > 0 and 1 or 0
"""
)
