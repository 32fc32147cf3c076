"""What Python sees of _speedups/http1.pyx: nothing. It is imported to find out whether the native modules are built."""
