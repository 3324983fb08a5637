"""Private DPO, as a script for launchers; the same as `hfnoise dp-dpo`.

    python examples/dp_dpo.py --config examples/configs/dp_dpo.yaml
    accelerate launch --config_file examples/accelerate/two_cpu_processes.yaml \
        examples/dp_dpo.py --config examples/configs/dp_dpo.yaml

The secret of the noise and the ledger of what was released lie below the Hugging Face home folder (`--secret_file`,
`--ledger_file`), not in the output folder. Options on the command line win over those of the file;
`hfnoise dp-dpo --help` lists them.
"""

import sys

from hfnoise.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["dp-dpo", *sys.argv[1:]]))
