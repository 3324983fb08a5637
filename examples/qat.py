"""Quantisation-aware training down to 1 bit, as a script for launchers; the same as `hfnoise qat`.

    python examples/qat.py --config examples/configs/qat.yaml
    accelerate launch --config_file examples/accelerate/two_cpu_processes.yaml \
        examples/qat.py --config examples/configs/qat.yaml

At the end the packed model is loaded again and writes a text (`--sample_prompt`), with tokens per second beside those
of the float model. Options on the command line win over those of the file; `hfnoise qat --help` lists them.
"""

import sys

from hfnoise.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["qat", *sys.argv[1:]]))
