def dataset_fingerprint(d):
    return "f" * 32
