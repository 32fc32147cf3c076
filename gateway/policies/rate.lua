-- A token bucket that several gateways share, and the tokens that they hold leased. One key, server time, whole numbers only.
--
-- A token is `period` units, and `unit` units come in each microsecond, so nothing is ever rounded. What lies in the bucket and
-- what is leased are together never more than `burst`: hence what is spent in any time is at most the burst and what came in
-- since, although a leased token is spent later than it was debited. What a gateway reports as spent is taken into account
-- only after the bucket was filled: it may have been spent just now.
--
-- A gateway that no longer knows what became of a command sends another with a higher number (seq); the older one, should it still
-- be executed after it, does nothing.
--
-- KEYS[1]  hash: level, at (microseconds), and a field for each lease: "out seq ends"
-- ARGV     period unit burst | want: spent at once | lease's name ("" for none) seq unspent | lease: tokens wanted in
--          advance, share: at most one share-th of what is there | back: tokens given back | life of a lease, us
-- Returns  granted, leased, kept (1: what was unspent still counts), left, retry us, reset us, life us, slice (0)

local period, unit, burst = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local want, name, seq = tonumber(ARGV[4]), ARGV[5], tonumber(ARGV[6])
local unspent, lease, share = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local back, life = tonumber(ARGV[10]), tonumber(ARGV[11])

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local level, at = burst * period, now
local leases, ended, out = {}, {}, 0

local stored = redis.call('HGETALL', KEYS[1])
for i = 1, #stored, 2 do
    if stored[i] == 'level' then
        level = tonumber(stored[i + 1])
    elseif stored[i] == 'at' then
        at = tonumber(stored[i + 1])
    else
        local held, number, ends = string.match(stored[i + 1], '^(%d+) (%d+) (%d+)$')
        leases[stored[i]] = {held = tonumber(held), seq = tonumber(number), ends = tonumber(ends)}
        out = out + tonumber(held)
    end
end

local function fill(till)
    if till > at then
        level = math.max(0, math.min(level + (till - at) * unit, (burst - out) * period))
        at = till
    end
end

for field, one in pairs(leases) do
    if one.ends <= now then
        fill(one.ends)
        out = out - one.held
        ended[#ended + 1] = field
    end
end
for _, field in ipairs(ended) do
    leases[field] = nil
    redis.call('HDEL', KEYS[1], field)
end
fill(now)

local kept = 1
if name ~= '' then
    local mine = leases[name]
    if mine and seq <= mine.seq then
        return {-1, 0, 0, 0, 0, 0, 0, 0}
    end
    local held = mine and mine.held or 0
    if unspent > held then
        -- Tokens that this server knows nothing of: their lease ended, or it has lost its data.
        unspent, kept = 0, 0
    end
    level = level + math.min(back, held - unspent) * period
    out = out - held + unspent
end

local granted = math.min(want, math.floor(level / period))
level = level - granted * period
local leased = math.min(lease, math.floor(level / period / share))
level = level - leased * period
out = out + leased

if name ~= '' then
    if unspent + leased > 0 then
        redis.call('HSET', KEYS[1], name, string.format('%.0f %.0f %.0f', unspent + leased, seq, now + life * 1.25))
    elseif leases[name] then
        redis.call('HDEL', KEYS[1], name)
    end
end
redis.call('HSET', KEYS[1], 'level', string.format('%.0f', level), 'at', string.format('%.0f', at))
local full = math.ceil((burst * period - level) / unit)
-- Once it is full again and no lease lives, the key says no more than its absence.
redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.ceil((full + life * 2) / 1000) + 1000))

local retry = 0
if level < period then
    retry = math.ceil((period - level) / unit)
end
return {granted, leased, kept, math.floor(level / period), retry, math.max(0, full - math.floor(out * period / unit)), life, 0}
