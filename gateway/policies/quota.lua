-- A quota: at most `limit` in an hour, day or month that several gateways share. One key, server time, whole numbers only.
--
-- What is leased is counted when it is given, in the slice of time in which it is given. A calendar's window is one slice; a lease
-- ends with it. A rolling window is 60 slices and two more: the one that has begun, and one for the life of a lease, so that no
-- stretch of the window's length holds more than the limit. What is unspent when the next lease is fetched is counted again
-- where it is now.
--
-- KEYS[1]  hash: slice -> count
-- ARGV     limit | hour, day, month, or rolling | length of a rolling window, us | want: spent at once | unspent and its slice |
--          lease: wanted in advance, share: at most one share-th of what is there | back: given back, of the same slice | life, us
-- Returns  granted, leased, kept (1: what was unspent still counts), left, retry us, reset us, life us, slice

local limit, kind, span, want = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local unspent, slice, lease, share = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local back, life = tonumber(ARGV[9]), tonumber(ARGV[10])
local SLICES = 60

local time = redis.call('TIME')
local seconds = tonumber(time[1])
local now = seconds * 1000000 + tonumber(time[2])

-- Year and month of a day since 1970 in the proleptic Gregorian calendar (by eras of 400 years that begin in March).
local function month_of(day)
    local shifted = day + 719468
    local era = math.floor(shifted / 146097)
    local of_era = shifted - era * 146097
    local year = math.floor((of_era - math.floor(of_era / 1460) + math.floor(of_era / 36524) - math.floor(of_era / 146096)) / 365)
    local of_year = of_era - (365 * year + math.floor(year / 4) - math.floor(year / 100))
    local from_march = math.floor((5 * of_year + 2) / 153)
    local first = day - (of_year - math.floor((153 * from_march + 2) / 5))
    local month = from_march < 10 and from_march + 3 or from_march - 9
    return (year + era * 400 + (month <= 2 and 1 or 0)) * 12 + month - 1, first
end

local current, ends, oldest, length
if kind == 'rolling' then
    length = span / SLICES
    current = math.floor(now / length)
    oldest = current - SLICES - 1
elseif kind == 'month' then
    local first
    current, first = month_of(math.floor(seconds / 86400))
    local after = first + 28
    while month_of(after) == current do
        after = after + 1
    end
    ends = after * 86400 * 1000000
    oldest = current
else
    length = (kind == 'hour' and 3600 or 86400) * 1000000
    current = math.floor(now / length)
    ends = (current + 1) * length
    oldest = current
end

local counts, total, first = {}, 0, current
local stored = redis.call('HGETALL', KEYS[1])
for i = 1, #stored, 2 do
    local id, count = tonumber(stored[i]), tonumber(stored[i + 1])
    if id < oldest then
        redis.call('HDEL', KEYS[1], stored[i])
    else
        counts[id] = count
        total = total + count
        if count > 0 and id < first then
            first = id
        end
    end
end

local function count(id, more)
    counts[id] = (counts[id] or 0) + more
    total = total + more
    redis.call('HSET', KEYS[1], string.format('%.0f', id), string.format('%.0f', counts[id]))
end

local kept = 1
if counts[slice] == nil or counts[slice] < unspent + back or (kind ~= 'rolling' and slice ~= current) then
    kept = 0
else
    if back > 0 then
        count(slice, -back)
    end
    if unspent > 0 and slice ~= current then
        count(slice, -unspent)
        count(current, unspent)
    end
end

local granted = math.max(0, math.min(want, limit - total))
local leased = math.max(0, math.min(lease, math.floor((limit - total - granted) / share)))
if granted + leased > 0 then
    count(current, granted + leased)
end

if kind == 'rolling' then
    ends = (first + SLICES + 2) * length
    redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.ceil((span + 3 * length) / 1000)))
else
    life = math.min(life, ends - now)
    redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.ceil((ends - now) / 1000) + 60000))
end
local left = limit - total
return {granted, leased, kept, math.max(0, left), left > 0 and 0 or math.ceil(ends - now), math.ceil(ends - now), life, current}
