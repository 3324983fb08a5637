"""A network of golden noise for your own pipeline, as a script for launchers; the same as `hfnoise golden-noise`.

    python examples/golden_noise/train.py --config examples/configs/golden_noise.yaml
    accelerate launch --config_file examples/accelerate/two_cpu_processes.yaml \
        examples/golden_noise/train.py --config examples/configs/golden_noise.yaml
    accelerate launch --multi_gpu --num_processes 8 examples/golden_noise/train.py \
        --model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --prompts_file prompts.txt \
        --verifier openai/clip-vit-large-patch14 --margin_temperature 1 --num_train_epochs 30 \
        --per_device_train_batch_size 8 --output_dir my-npnet --push_to_hub

Pairs of noise and golden noise are collected beside the output folder, where another run, or one that goes on after an
interruption, finds them. What they hold is printed, then the network is trained on them, and compared with plain noise
by the verifier. Options on the command line win over those of the file; `hfnoise golden-noise --help` lists them.
"""

import sys

from hfnoise.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["golden-noise", *sys.argv[1:]]))
