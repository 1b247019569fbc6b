"""python -m services.gateway --model FOLDER --verifier HOST:PORT --redis-url URL"""

from __future__ import annotations

from services.common.service import run_service
from services.gateway.server import serve
from services.gateway.settings import GatewaySettings

if __name__ == "__main__":
    run_service(GatewaySettings, "gateway", serve)
