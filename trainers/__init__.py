"""Trainer subclasses of hfnoise; import them as `from hfnoise import RobustDPOTrainer`, or from `hfnoise.trainers`."""

if __name__ != "hfnoise.trainers":
    # A second copy of every class under another name would break isinstance and pickle without a word.
    raise ImportError("import hfnoise.trainers instead of the bare folder 'trainers'")
