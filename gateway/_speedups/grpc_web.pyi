"""What Python sees of _speedups/grpc_web.pyx: nothing. The engine calls it; tests go through `testing`."""
