"""Diffusers side of hfnoise; import it as `hfnoise.pipelines`."""

if __name__ != "hfnoise.pipelines":
    # A second copy of every class under another name would break isinstance and pickle without a word.
    raise ImportError("import hfnoise.pipelines instead of the bare folder 'pipelines'")
