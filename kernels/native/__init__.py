"""The kernels for the CPU: C++ that is built for the machine at set-up and loaded with ctypes."""
