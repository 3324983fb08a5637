"""A module of One More Step for your own pipeline, as a script for launchers; the same as `hfnoise one-more-step`.

    python examples/one_more_step/train.py --config examples/configs/one_more_step.yaml
    accelerate launch --config_file examples/accelerate/two_cpu_processes.yaml \
        examples/one_more_step/train.py --config examples/configs/one_more_step.yaml
    accelerate launch --multi_gpu --num_processes 8 examples/one_more_step/train.py \
        --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --dataset_name my_images --resolution 512 \
        --per_device_train_batch_size 32 --bf16 --output_dir my-oms-module --push_to_hub

At the end it prints which share of the variance of the brightness the prompts explain, and how to use the module.
Options on the command line win over those of the file; `hfnoise one-more-step --help` lists them.
"""

import sys

from hfnoise.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["one-more-step", *sys.argv[1:]]))
