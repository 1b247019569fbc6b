"""python -m services.verifier --llm FOLDER [--speculator HOST:PORT ...]"""

from services.common.service import run_service
from services.verifier.server import serve
from services.verifier.settings import VerifierSettings

if __name__ == "__main__":
    run_service(VerifierSettings, "verifier", serve)
