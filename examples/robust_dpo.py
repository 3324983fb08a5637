"""Robust DPO on noisy preferences, as a script for launchers; the same as `hfnoise robust-dpo`.

    python examples/robust_dpo.py --config examples/configs/robust_dpo.yaml
    accelerate launch --config_file examples/accelerate/two_cpu_processes.yaml \
        examples/robust_dpo.py --config examples/configs/robust_dpo.yaml
    accelerate launch --multi_gpu --num_processes 8 \
        examples/robust_dpo.py --config my_run.yaml --learning_rate 1e-6

Options on the command line win over those of the file; `hfnoise robust-dpo --help` lists them.
"""

import sys

from hfnoise.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["robust-dpo", *sys.argv[1:]]))
