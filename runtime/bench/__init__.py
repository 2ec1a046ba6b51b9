"""``edge-lora bench``: what loading, switching and running cost on this device, each on its own."""

from edge_lora.runtime.bench.bundle_bench import BenchReport, bench_bundle

__all__ = ["BenchReport", "bench_bundle"]
