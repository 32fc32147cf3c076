"""What Python sees of _speedups/client_hello.pyx: nothing."""
