"""What the frontend's flags say."""

from __future__ import annotations

from dataclasses import dataclass, field

from dynamo_frontend.busy import Thresholds
from dynamo_frontend.media import MediaLimits
from dynamo_grpc import RouterMode
from dynamo_grpc.migration import MIGRATION_LIMIT


@dataclass(frozen=True, slots=True)
class FrontendSettings:
    """What the frontend's flags say; `dynamo-grpc frontend --help` explains them."""

    namespace: str = ""
    router_mode: RouterMode = RouterMode.RoundRobin
    max_body_bytes: int = 64 * 1024 * 1024
    max_bodies_bytes: int = 1024 * 1024 * 1024
    instance_wait_s: float = 10.0
    migration_limit: int = MIGRATION_LIMIT
    first_output_timeout_s: float | None = 120.0
    output_gap_timeout_s: float | None = 30.0
    max_requests: int | None = None
    overload_status: int = 503
    thresholds: Thresholds = field(default_factory=Thresholds)
    has_admin_api: bool = True
    has_page: bool = True
    media: MediaLimits = field(default_factory=MediaLimits)
    is_strict: bool = False
    grpc_host: str = "127.0.0.1"
    grpc_port: int | None = None
    shares_grpc_port: bool = False
    grpc_admin_port: int | None = None
    grpc_max_connection_age_s: float = 300.0
    backend_metrics_endpoint: str = ""
    backend_metrics_interval_s: float = 0.0
