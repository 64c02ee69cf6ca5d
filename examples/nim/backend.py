"""A back end that serves nothing but figures of its own, as a proxy to an external service (NIM, say) would have them.

python examples/nim/backend.py                              # the registry at ETCD_ENDPOINTS
DYN_DISCOVERY_BACKEND=static python examples/nim/backend.py --port 9300
"""

import argparse
import asyncio
import json
import random
import time

from dynamo_grpc import DistributedRuntime, dynamo_worker

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--custom-backend-metrics-endpoint", default="nim.backend.runtime_stats", metavar="NS.COMP.EP")
parser.add_argument("--port", type=int, default=0, help="gRPC port; 0 takes a free one")
args = parser.parse_args()


class Stats:
    """Figures that look like those of an engine; a real one would ask it here."""

    def __init__(self) -> None:
        self.requests = 0

    async def generate(self, request):
        """One answer: a string that holds JSON."""
        self.requests += random.randint(0, 5)
        yield json.dumps(
            {
                "schema_version": 1,
                "worker_id": "mock-worker-1",
                "backend": "vllm",
                "ts": time.time(),
                "metrics": {
                    "gauges": {
                        "kv_cache_usage_perc": round(random.uniform(0.3, 0.93), 3),
                        "gpu_utilization_perc": round(random.uniform(50, 97.5), 1),
                        "active_requests": random.randint(0, 14),
                    },
                    "counters": {"backend_requests": self.requests},
                },
            }
        )


@dynamo_worker(port=args.port)
async def main(runtime: DistributedRuntime):
    """Serve the endpoint until SIGTERM."""
    endpoint = runtime.endpoint(args.custom_backend_metrics_endpoint)
    await endpoint.serve_endpoint(Stats().generate)


if __name__ == "__main__":
    asyncio.run(main())
