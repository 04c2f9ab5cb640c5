"""What PEFT may be asked for after layers were made fast. Each is a generator, which yields where the outputs are those
that PEFT's own layers give."""


def disable(model):
    with model.disable_adapter():
        yield
    yield


def merge(model):
    model.merge_adapter()
    yield
    model.unmerge_adapter()
    yield


def unload(model):
    model.unload()
    yield
