"""A federation in one process, as a script; the same as `hfnoise fedsvd`.

    python examples/fedsvd.py --config examples/configs/fedsvd.yaml

Every client has a secret and a ledger of its own below the Hugging Face home folder. For clients on several machines
see `examples/flower`. Options on the command line win over those of the file; `hfnoise fedsvd --help` lists them.
"""

import sys

from hfnoise.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["fedsvd", *sys.argv[1:]]))
