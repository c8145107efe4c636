"""What runs inside Redis when a router exchanges. Nothing that lies there is trusted: a key of another type is dropped,
a value is read only as far as it can be one of ours, and every loop has a bound.

    {D}:last:R        the number of the last batch of router R
    {D}:routers       hash   R -> its row (router/turns/neighbours.py)
    {D}:service:B:T   number: service of tenant T in band B, per weight
    {D}:running:T     hash   R -> "COUNT AT": requests of tenant T in flight at R, as of AT
    {D}:bucket:N      "S AT": at AT (clock of Redis) the bucket needed S seconds to be full

D is the deployment. A bucket keeps seconds and not the time at which it will be full, so that a clock that is set back
locks nobody out; one that is set forward fills buckets.
"""

EXCHANGE = """
-- KEYS: 1 last number of this router, 2 rows, 3.. entries
-- ARGV: 1 router, 2 number, 3 '1': whatever the last number was, 4 its row, 5 most rows, 6 most bytes of a row,
--       7 how many rows to take out, their names, then per entry: kind, added, at least, most, asked, full;
--       kind: 's' service, 'r' the same, replaced by `at least`; 'b' bucket: of what is left up to `full`, so much as
--       is asked is granted; 'c' requests in flight, `added` here, of `most` at all: the same
local router, number, anyhow = ARGV[1], tonumber(ARGV[2]), ARGV[3] == '1'
local most_rows, most_bytes = tonumber(ARGV[5]), tonumber(ARGV[6])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6

local function text(value) return string.format('%.17g', value) end

local function finite(word)
  local value = tonumber(word)
  if value and value == value and value > -1e300 and value < 1e300 then return value end
  return nil
end

local function short(key)
  local found = redis.pcall('GETRANGE', key, 0, 99)
  if type(found) == 'table' then
    redis.call('UNLINK', key)
    return ''
  end
  return found
end

local last = finite(short(KEYS[1])) or 0
if last ~= number and last ~= number - 1 and not anyhow then
  return {'behind'}
end
redis.call('SET', KEYS[1], number, 'EX', 86400)

local rows = redis.pcall('HLEN', KEYS[2])
if type(rows) == 'table' or rows > most_rows then redis.call('UNLINK', KEYS[2]) end
local gone = tonumber(ARGV[7])
for i = 8, 7 + gone do redis.call('HDEL', KEYS[2], ARGV[i]) end
redis.call('HSET', KEYS[2], router, ARGV[4])
redis.call('EXPIRE', KEYS[2], 3600)
local others = {}
for _, name in ipairs(redis.call('HKEYS', KEYS[2])) do
  if #name > 100 or redis.call('HSTRLEN', KEYS[2], name) > most_bytes then
    redis.call('HDEL', KEYS[2], name)
  elseif name ~= router then
    others[#others + 1] = name
    others[#others + 1] = redis.call('HGET', KEYS[2], name)
  end
end

local function running_elsewhere(key)
  local count = redis.pcall('HLEN', key)
  if type(count) == 'table' or count > most_rows then
    redis.call('UNLINK', key)
    return 0
  end
  local sum = 0
  for _, name in ipairs(redis.call('HKEYS', key)) do
    local running, at = nil, nil
    if #name <= 100 and redis.call('HSTRLEN', key, name) <= 100 then
      running, at = string.match(redis.call('HGET', key, name), '^(%S+) (%S+)$')
      running, at = finite(running or ''), finite(at or '')
    end
    if not running or not at or running < 0 or running > 1e6 or math.abs(now - at) > 5 then
      redis.call('HDEL', key, name)
    elseif name ~= router then
      sum = sum + running
    end
  end
  return sum
end

local totals, grants = {}, {}
for i = 1, #KEYS - 2 do
  local key, at = KEYS[2 + i], 2 + gone + 6 * i
  local kind, added, least, most = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  local found = kind == 'c' and '' or short(key)
  local value
  if kind == 'c' then
    value = running_elsewhere(key)
    local granted = math.max(0, math.min(tonumber(ARGV[at + 4]), most - added - value))
    if added + granted > 0 then
      redis.call('HSET', key, router, text(added + granted) .. ' ' .. text(now))
      redis.call('EXPIRE', key, 60)
    else
      redis.call('HDEL', key, router)
    end
    grants[i] = text(granted)
  elseif kind == 'b' then
    local seconds, stamp = string.match(found, '^(%S+) (%S+)$')
    seconds, stamp = finite(seconds or ''), finite(stamp or '')
    value = 0
    if seconds and stamp and seconds <= most then value = math.max(0, seconds - math.max(0, now - stamp)) end
    if last ~= number then
      value = math.max(0, math.min(most, math.max(value + added, least)))
      local granted = math.max(0, math.min(tonumber(ARGV[at + 4]), tonumber(ARGV[at + 5]) - value))
      value = value + granted
      grants[i] = text(granted)
    end
    if last ~= number or found ~= '' then
      redis.call('SET', key, text(value) .. ' ' .. text(now), 'EX', 3600)
    end
  else
    value = finite(found) or 0
    if last ~= number then
      value = kind == 'r' and least or math.max(value + added, least)
      redis.call('SET', key, text(value), 'EX', 3600)
    end
  end
  totals[i] = text(value)
  grants[i] = grants[i] or '0'
end
return {'ok', others, totals, grants}
"""
