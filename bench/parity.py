"""The exported bundle against torch, on inputs that the exporter did not see."""

from __future__ import annotations

import numpy as np
import torch

from bench.common import language_feeds, manifest_of, report, smollm2_bundle
from edge_lora.bases import load_model
from edge_lora.runtime import open_bundle


def main() -> None:
    """Print the relative error of the logits per shape: max |difference| / max |torch|."""
    model = load_model("smollm2").model.eval()
    rows = []
    for slots in ("none", "inputs"):
        folder = smollm2_bundle(slots)
        with open_bundle(folder, threads=2) as session:
            for length in (1, 7, 64):
                feeds = language_feeds(manifest_of(folder), length, 0)
                found = session.run(feeds)["logits"]
                with torch.no_grad():
                    expected = model(torch.from_numpy(feeds["input_ids"])).logits.numpy()
                error = float(np.abs(found - expected).max() / np.abs(expected).max())
                rows.append({"slots": slots, "tokens": length, "relative error": error})
    report("parity", rows, "SmolLM2-135M, fp32.")


if __name__ == "__main__":
    main()
