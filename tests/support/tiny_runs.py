"""Arguments of avsi-train for short trainings on the tiny dataset; trainings of one config share compiled steps."""


def arguments(workdir, data_dir, **fields) -> list[str]:
    """Arguments for the config of the fixture `trained`: two epochs of two steps; `fields` override config fields."""
    fields = {"data_dir": data_dir, "units": 8, "bottleneck": 8} | fields
    return ["--config=tiny", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in fields.items())]
