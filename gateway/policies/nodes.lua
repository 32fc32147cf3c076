-- How many gateways there are: each says every few seconds that it is there.
--
-- KEYS[1]  sorted set: gateway -> when it was last heard of, ms
-- ARGV     gateway | ms after which one that was not heard of is gone
-- Returns  how many are there

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
redis.call('ZADD', KEYS[1], string.format('%.0f', now), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now - tonumber(ARGV[2])))
redis.call('PEXPIRE', KEYS[1], tonumber(ARGV[2]) * 10)
return redis.call('ZCARD', KEYS[1])
