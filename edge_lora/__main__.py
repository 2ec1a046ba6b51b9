"""``python -m edge_lora``, and ``accelerate launch -m edge_lora train …`` on several GPUs."""

from edge_lora.cli import main

if __name__ == "__main__":
    main(prog_name="edge-lora")
