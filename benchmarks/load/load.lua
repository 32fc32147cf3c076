-- The request that wrk repeats, given after `--` as key=value words, and one line of JSON with the counts at the end.
--
--   method=POST   body=FILE   token=TEXT   close=1   paths=FILE (one a line, asked for in turn)
--
-- wrk formats a request once. With `paths` they are all formatted before the load, and each call only picks the next.
local function lines_of(name)
   local found = {}
   for line in io.lines(name) do found[#found + 1] = line end
   return found
end

function init(args)
   local paths
   for _, word in ipairs(args) do
      local key, value = word:match("^(%a+)=(.*)$")
      if key == "method" then
         wrk.method = value
      elseif key == "body" then
         local file = assert(io.open(value, "rb"))
         wrk.body = file:read("*a")
         wrk.headers["Content-Type"] = "application/json"
         file:close()
      elseif key == "token" then
         wrk.headers["Authorization"] = "Bearer " .. value
      elseif key == "close" then
         wrk.headers["Connection"] = "close"
      elseif key == "paths" then
         paths = lines_of(value)
      else
         error("load.lua does not know " .. word)
      end
   end
   if paths then
      local ready, last, at = {}, #paths, 0
      for index, path in ipairs(paths) do ready[index] = wrk.format(nil, path) end
      request = function()
         at = at % last + 1
         return ready[at]
      end
   end
end

function done(summary, latency, requests)
   local e = summary.errors
   io.write(string.format(
      'result {"requests":%d,"microseconds":%d,"bytes":%d,"connect":%d,"read":%d,"write":%d,"timeout":%d,"status":%d,'
      .. '"p50_us":%d,"p99_us":%d}\n',
      summary.requests, summary.duration, summary.bytes, e.connect, e.read, e.write, e.timeout, e.status,
      latency:percentile(50), latency:percentile(99)))
end
