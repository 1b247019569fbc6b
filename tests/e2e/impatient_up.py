"""`specserve up` that takes a service to hang after 3 s without an answer; its flags."""

from functools import partial

from services.common.command_line import run_command
from services.launcher.limits import Limits
from services.launcher.settings import UpSettings
from services.launcher.up import up

IMPATIENT = Limits(alive_pause_s=0.5, alive_timeout_s=1.0, alive_attempts=3)

if __name__ == "__main__":
    run_command(UpSettings, "up", partial(up, limits=IMPATIENT))
