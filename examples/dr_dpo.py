"""Dr. DPO over the global batch, as a script for launchers; the same as `hfnoise dr-dpo`.

    python examples/dr_dpo.py --config examples/configs/dr_dpo.yaml
    accelerate launch --config_file examples/accelerate/two_cpu_processes.yaml \
        examples/dr_dpo.py --config examples/configs/dr_dpo.yaml

Options on the command line win over those of the file; `hfnoise dr-dpo --help` lists them.
"""

import sys

from hfnoise.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["dr-dpo", *sys.argv[1:]]))
