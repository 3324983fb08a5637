"""The secret of a private run: 32 random bytes in a file that only its owner can read, outside of what is shared."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

_SIZE = 32
_TEST_LABEL = b"hfnoise unsafe seed, not private:"


def load_or_create_secret(path: str | Path, output_dir: str | Path) -> bytes:
    """Return the secret in a file; a new one is drawn from the operating system if the file does not exist.

    Who knows the secret can recompute the noise and subtract it, so the file must stay out of `output_dir`, whose
    content is shared and pushed.

    Args:
        path (`str` or `Path`): the file; created with mode 0600, its folder with 0700.
        output_dir (`str` or `Path`): the folder of the run, in which the secret must not lie.

    Returns:
        `bytes`: 32 of them.

    Raises:
        ValueError: if the file lies in `output_dir`, is readable by others, or does not hold 64 hexadecimal digits.

    Example:
        >>> from hfnoise.privacy.secret_file import load_or_create_secret
        >>> secret = load_or_create_secret("secrets/key", output_dir="out")
        >>> secret == load_or_create_secret("secrets/key", output_dir="out")
        True
    """
    path = Path(path).expanduser()
    if Path(output_dir).expanduser().resolve() in [path.resolve(), *path.resolve().parents]:
        raise ValueError(
            f"secret_file={str(path)!r} lies in output_dir={str(output_dir)!r}, which is shared and pushed: with the "
            "secret anybody can subtract the noise, and no privacy is left. Put it elsewhere."
        )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        # O_EXCL: of two runs that start at once one writes and the other reads; mode 0600 from the first moment on.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read(path)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(os.urandom(_SIZE).hex())
        file.flush()
        os.fsync(file.fileno())
    return _read(path)


def _read(path: Path) -> bytes:
    others = stat.S_IMODE(path.stat().st_mode) & 0o077
    if others:
        raise ValueError(
            f"secret file {str(path)!r} can be read by others (mode {stat.S_IMODE(path.stat().st_mode):04o}): with "
            f"the secret anybody can subtract the noise. If nobody has read it: chmod 600 {path}; else delete it."
        )
    text = path.read_text(encoding="ascii", errors="replace").strip()
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != _SIZE:
        raise ValueError(
            f"secret file {str(path)!r} does not hold {2 * _SIZE} hexadecimal digits. Give a file that hfnoise wrote, "
            "or the name of one that does not exist yet."
        )
    return secret


def unsafe_secret(seed: int) -> bytes:
    """Return a secret that anybody can recompute from a small number: for tests, NOT PRIVATE.

    Args:
        seed (`int`): any integer.

    Example:
        >>> from hfnoise.privacy.secret_file import unsafe_secret
        >>> len(unsafe_secret(0))
        32
    """
    return hashlib.sha256(_TEST_LABEL + str(int(seed)).encode()).digest()


def run_key(secret: bytes, run_id: str) -> bytes:
    """Return the key of one run, so that two runs with one secret share no draw.

    Noise that two different runs shared would cancel in the difference of what they release.

    Args:
        secret (`bytes`): 32 bytes.
        run_id (`str`): of the run; public.

    Returns:
        `bytes`: 32 of them, for [`KeyedRandom`].

    Example:
        >>> from hfnoise.privacy.secret_file import run_key
        >>> run_key(bytes(32), "first") != run_key(bytes(32), "second")
        True
    """
    return hashlib.sha256(b"hfnoise run key:" + len(secret).to_bytes(4, "big") + secret + run_id.encode()).digest()


def secret_name(secret: bytes) -> str:
    """Return a name of a secret that tells nothing about it, to recognise it on resume.

    Example:
        >>> from hfnoise.privacy.secret_file import secret_name
        >>> len(secret_name(bytes(32)))
        16
    """
    return hashlib.sha256(b"hfnoise secret name:" + secret).hexdigest()[:16]
