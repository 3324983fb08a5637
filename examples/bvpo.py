"""BVPO on answers with reasoning traces and without, as a script for launchers; the same as `hfnoise bvpo`.

    python examples/bvpo.py --config examples/configs/bvpo.yaml
    accelerate launch --config_file examples/accelerate/two_cpu_processes.yaml \
        examples/bvpo.py --config examples/configs/bvpo.yaml

`hfnoise make-trace-pairs` samples such answers from your model. Options on the command line win over those of the
file; `hfnoise bvpo --help` lists them.
"""

import sys

from hfnoise.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bvpo", *sys.argv[1:]]))
