"""Private supervised fine-tuning, as a script for launchers; the same as `hfnoise dp-sft`.

    python examples/dp_sft.py --config examples/configs/dp_sft.yaml
    accelerate launch --config_file examples/accelerate/two_cpu_processes.yaml \
        examples/dp_sft.py --config examples/configs/dp_sft.yaml

The secret of the noise and the ledger of what was released lie below the Hugging Face home folder (`--secret_file`,
`--ledger_file`), not in the output folder. Options on the command line win over those of the file;
`hfnoise dp-sft --help` lists them.
"""

import sys

from hfnoise.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["dp-sft", *sys.argv[1:]]))
