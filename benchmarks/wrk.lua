-- wrk posts the bodies of the folder $LOAD in turn and prints what came of it as one line of JSON.
local folder = os.getenv("LOAD")
wrk.method = "POST"
for line in io.lines(folder .. "/headers") do
  local name, value = line:match("^(.-)\t(.*)$")
  wrk.headers[name] = value
end

local requests, number = {}, 0

function init(args)
  for body in io.lines(folder .. "/bodies") do
    requests[#requests + 1] = wrk.format("POST", wrk.path, nil, body)
  end
end

function request()
  number = number % #requests + 1
  return requests[number]
end

local shown = false
function response(status, headers, body)
  if status ~= 200 and not shown then
    print("status", status, string.sub(body, 1, 200))
    shown = true
  end
end

function done(summary, latency, _)
  local e = summary.errors
  io.write(string.format('{"requests":%d,"errors":%d,"seconds":%.6f,"p50":%.3f,"p99":%.3f}\n',
    summary.requests, e.connect + e.read + e.write + e.status + e.timeout, summary.duration / 1e6,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
