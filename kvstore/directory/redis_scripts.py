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
"""

PREFIX = "tandem:kvdir"
EPOCH_DIGITS, GENERATION_DIGITS, SIZE_DIGITS = 20, 12, 15

# The node, as it was last heard. A later epoch makes the entries of an earlier one void.
_COMMON = """
local P = KEYS[1]
local node, epoch = ARGV[1], ARGV[2]
local function void(gen, old)
  redis.call('SADD', P .. ':void', old .. gen .. node)
end
local function alive(gen, ttl)
  redis.call('SET', P .. ':alive:' .. node, epoch .. gen, 'PX', ttl)
end
local record = P .. ':node:' .. node
local known = redis.call('HMGET', record, 'epoch', 'gen', 'seq')
local old, gen, seq = known[1], known[2], tonumber(known[3] or '0')
"""

# ARGV: node, epoch, seq, info, ttl in ms, now. Returns verdict, seq.
ANNOUNCE = (
    _COMMON
    + """
if old and old > epoch then return {'superseded', seq} end
if not old or old < epoch then
  if old then void(gen, old) end
  gen, seq = string.rep('0', 12), 0
  redis.call('HSET', record, 'epoch', epoch, 'gen', gen, 'seq', 0)
  redis.call('SADD', P .. ':members', node)
end
redis.call('HSET', record, 'info', ARGV[4], 'heard', ARGV[6])
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
if not old or old < epoch then return {'resync', 0} end
if old > epoch then return {'superseded', seq} end
if number <= seq then return {'ok', seq} end
if reset then
  void(gen, old)
  gen = string.format('%012d', number)
elseif number ~= seq + 1 then
  return {'resync', seq}
end
local incarnation = epoch .. gen .. node
local held = P .. ':held:' .. incarnation
local at, last = 1, #events
while at <= last do
  local length = string.byte(events, at)
  local key = string.sub(events, at + 1, at + length)
  local tier = string.sub(events, at + length + 1, at + length + 1)
  local size = tonumber(string.sub(events, at + length + 2, at + length + 16))
  at = at + length + 17
  if size > 0 then
    local text = string.format('%.0f', size)
    redis.call('HSET', P .. ':k:' .. key, tier .. incarnation, text)
    redis.call('HSET', held, key .. tier, text)
  else
    redis.call('HDEL', P .. ':k:' .. key, tier .. incarnation)
    redis.call('HDEL', held, key .. tier)
  end
end
redis.call('HSET', record, 'gen', gen, 'seq', number)
alive(gen, ARGV[6])
redis.call('XADD', P .. ':stream', 'MAXLEN', '~', ARGV[7], '*',
  'node', node, 'epoch', epoch, 'seq', number, 'reset', ARGV[4], 'events', events)
return {'ok', number}
"""
)

# ARGV: node, epoch, oldest time of a sign of life that still counts ('' if the node itself leaves). Returns 1 if done.
BURY = (
    _COMMON
    + """
if old ~= epoch then return 0 end
if ARGV[3] ~= '' then
  local heard = tonumber(redis.call('HGET', record, 'heard') or '0')
  if heard >= tonumber(ARGV[3]) or redis.call('EXISTS', P .. ':alive:' .. node) == 1 then return 0 end
end
void(gen, old)
redis.call('DEL', record, P .. ':alive:' .. node)
redis.call('SREM', P .. ':members', node)
return 1
"""
)

# KEYS: the prefix, then the keys looked up. Returns per key: field, size, field, size, ... of live incarnations.
LOOKUP = """
local P = KEYS[1]
local prefix = P .. ':k:'
local live, out = {}, {}  -- fields repeat from key to key: each is cut once
for i = 2, #KEYS do
  local found = redis.call('HGETALL', prefix .. KEYS[i])
  local all = true
  for j = 1, #found, 2 do
    local field = found[j]
    local is_live = live[field]
    if is_live == nil then
      is_live = redis.call('GET', P .. ':alive:' .. string.sub(field, 34)) == string.sub(field, 2, 33)
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

# Returns for every member: node, epoch, gen, seq, info, heard, 1 if it lives.
STATES = """
local P = KEYS[1]
local out = {}
for _, node in ipairs(redis.call('SMEMBERS', P .. ':members')) do
  local it = redis.call('HMGET', P .. ':node:' .. node, 'epoch', 'gen', 'seq', 'info', 'heard')
  if it[1] and it[4] then
    local now = redis.call('GET', P .. ':alive:' .. node)
    out[#out + 1] = {node, it[1], it[2], it[3], it[4], it[5] or '0', now == it[1] .. it[2] and 1 or 0}
  end
end
return out
"""

# Takes back up to ARGV[2] entries of the void incarnation ARGV[1]. Returns 1 when nothing is left of it.
SWEEP = """
local P, incarnation = KEYS[1], ARGV[1]
local node = string.sub(incarnation, 33)
local now = redis.call('HMGET', P .. ':node:' .. node, 'epoch', 'gen')
if now[1] and now[1] .. now[2] == string.sub(incarnation, 1, 32) then
  redis.call('SREM', P .. ':void', incarnation)
  return 1
end
local held = P .. ':held:' .. incarnation
local fields = redis.call('HRANDFIELD', held, ARGV[2])
for _, field in ipairs(fields) do
  redis.call('HDEL', P .. ':k:' .. string.sub(field, 1, -2), string.sub(field, -1) .. incarnation)
end
if #fields > 0 then redis.call('HDEL', held, unpack(fields)) end
if redis.call('EXISTS', held) == 1 then return 0 end
redis.call('SREM', P .. ':void', incarnation)
return 1
"""
