"""Names of spans' attributes and events, from OpenTelemetry's conventions where they have them.

HTTP: stable, 1.23. RPC: release candidate, 1.40. GenAI: in development, as of 2026. Ours begin with `dynamo.`. They are
said here alone, so that another version is one change.
"""

from __future__ import annotations

HTTP_METHOD = "http.request.method"
HTTP_ROUTE = "http.route"
HTTP_STATUS = "http.response.status_code"

RPC_SYSTEM = "rpc.system.name"
RPC_METHOD = "rpc.method"
SERVER_ADDRESS = "server.address"
SERVER_PORT = "server.port"
ERROR_TYPE = "error.type"

OPERATION = "gen_ai.operation.name"
REQUEST_MODEL = "gen_ai.request.model"
STREAM = "gen_ai.request.stream"
MAX_TOKENS = "gen_ai.request.max_tokens"
FINISH_REASONS = "gen_ai.response.finish_reasons"
FIRST_CHUNK_S = "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"

REQUEST_ID = "dynamo.request_id"
ENDPOINT = "dynamo.endpoint"
INSTANCE_ID = "dynamo.instance_id"
ATTEMPT = "dynamo.attempt"
NUM_MIGRATIONS = "dynamo.num_migrations"

#: Events.
FIRST_OUTPUT = "first_output"
CANCELLED = "cancelled"
RETRIED = "retried_elsewhere"
MIGRATED = "migrated"
QUEUED = "queued"
TURN = "turn"
