"""Print constraints that pin what setup.py requires to the oldest version that it allows; torch: see constraints.txt.

pip install -c constraints.txt -c <(python .ci/floors.py) -e '.[test]'
"""

import re
from pathlib import Path

SETUP = Path(__file__).parent.parent / "setup.py"


def floors() -> dict[str, str]:
    """Return the oldest allowed version by library."""
    text = SETUP.read_text(encoding="utf-8")
    # Only what users of hfnoise install: up to the lists for tests and site.
    parts = [text[text.index("quant = ") : text.index("# The site made of docs/")]]
    parts.append(text[text.index("install_requires") : text.index("extras_require")])
    return dict(re.findall(r"""["']([\w-]+)>=([\d.]+)""", "\n".join(parts)))


if __name__ == "__main__":
    for name, version in floors().items():
        if name != "torch":
            print(f"{name}=={version}")
