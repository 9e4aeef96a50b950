"""Trainings of the session's tiny dataset by the command line: those of one config share what is compiled."""


def arguments(workdir, data_dir, **fields) -> list[str]:
    """Of avsi-train, for the config of the fixture `trained`: two epochs of two steps; fields override."""
    fields = {"data_dir": data_dir, "units": 8, "bottleneck": 8} | fields
    return ["--config=tiny", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in fields.items())]
