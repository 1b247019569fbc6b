"""python -m services.speculator [--ssm FOLDER ...]"""

from services.common.service import run_service
from services.speculator.server import serve
from services.speculator.settings import SpeculatorSettings

if __name__ == "__main__":
    run_service(SpeculatorSettings, "speculator", serve)
