"""What all services share. It is imported before gRPC, whose core reads the environment when it is loaded."""

import os

# From 1.80 on gRPC's core hands every message of a Python process to its event engine's threads, which wake its poller
# in turn; without that engine the poller itself reads the sockets: two changes of threads less for each message, a
# quarter of the time of a small one on two cores. A gRPC that has no such experiments any more says so and goes on.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
