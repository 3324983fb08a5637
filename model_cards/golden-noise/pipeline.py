try:
    # Under one name: diffusers runs the files of all local folders in one module, which may hold one class.
    from hfnoise.pipelines.custom_pipelines import GoldenNoiseCustomPipeline as GuidedPipeline  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("this pipeline is part of hfnoise: pip install hfnoise", name=error.name) from error
