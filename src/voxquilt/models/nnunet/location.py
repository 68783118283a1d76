"""Finds the model folder that a path means, and says what may have been meant where it is none."""

import os
from pathlib import Path

from voxquilt.errors import ConfigError
from voxquilt.models.nnunet.exported_zip import EXPORTED_ZIP
from voxquilt.models.zipped_folder import unpack_model
from voxquilt.text import question

FILES = ("plans.json", "dataset.json")


def locate_model(path: Path) -> Path:
    """The model folder that a path means: the folder itself, or one out of an exported zip.

    Raises:
        ConfigError: it is not there, is something else, or holds several models.
    """
    path = path.expanduser()
    file = next((place for place in (path, *path.parents) if os.path.isfile(place)), None)
    if file is None:
        return _check_folder(path)
    if EXPORTED_ZIP.recognises(file):
        return unpack_model(file, path.relative_to(file).as_posix() if path != file else None, EXPORTED_ZIP)
    if file.parent.name.startswith("fold_"):
        hint = f" Did you mean {file.parents[1]}, with checkpoint={file.name}?"
    else:
        hint = f" Did you mean {file.parent}?" if file.name in FILES else EXPORTED_ZIP.describe_other(file)
    raise ConfigError(f"{file} is a file; wanted is a model folder of nnU-Net, or a zip that it exported.{hint}")


def locate_plans(path: Path, name: str | None) -> tuple[Path, Path]:
    """The folder that a path means, and the file with plans in it: trained or not.

    Args:
        path: A folder with plans and dataset.json, an exported zip, or the file of the plans.
        name: The plans' file, whose ending may be left out; None takes plans.json, or the only one.

    Raises:
        ConfigError: there is none, or there are several.
    """
    if os.path.isfile(path) and path.suffix == ".json" and path.name != "dataset.json" and name is None:
        path, name = path.parent, path.name
    if not path.is_dir() or (name is None and (path / "plans.json").is_file()):
        path = locate_model(path)
    there = sorted(file.name for file in path.glob("*.json") if "plans" in file.name.lower())
    if name is None:
        name = "plans.json" if "plans.json" in there or len(there) != 1 else there[0]
    name = name if name.endswith(".json") else f"{name}.json"
    if Path(name).name != name or not (path / name).is_file():
        if not there:
            raise _without_plans(path)
        raise ConfigError(f"{path} has no {name}; choose by model.plans: {', '.join(there)}.{question(name, there)}")
    if not (path / "dataset.json").is_file():
        raise ConfigError(f"{path} has no dataset.json, which says what channels and labels are. Copy it there.")
    return path, path / name


def _without_plans(path: Path) -> ConfigError:
    models = [str(model) for model in find_models(path)]
    if len(models) == 1:
        return ConfigError(f"{path} has no plans. Did you mean {models[0]}?")
    if models:
        return ConfigError(f"{path} has no plans, but holds folders that do: {', '.join(models[:8])}.")
    return ConfigError(
        f"{path} has no plans of nnU-Net: no plans.json, and no other .json with 'plans' in its name. They are in a "
        f"trained model's folder, and in nnUNet_preprocessed/DatasetNNN_NAME once nnUNetv2_plan_experiment has run."
    )


def find_models(path: Path) -> list[Path]:
    """Model folders in a folder, at most two levels down."""
    plans = (file for pattern in ("plans.json", "*/plans.json", "*/*/plans.json") for file in path.glob(pattern))
    return sorted(file.parent for file in plans if (file.parent / "dataset.json").is_file())


def _check_folder(path: Path) -> Path:
    if not path.is_dir():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = question(path.name, siblings, prefix=f"{path.parent}{os.sep}")
        raise ConfigError(f"{path} is not there; wanted is a model folder of nnU-Net.{near}")
    missing = [name for name in FILES if not (path / name).is_file()]
    if not missing:
        return path
    if len(missing) == 1:
        raise ConfigError(f"{path} has no {missing[0]}, which a model folder of nnU-Net has. Copy it there.")
    if all((path.parent / name).is_file() for name in FILES):
        raise ConfigError(f"{path} is a part of a model folder of nnU-Net. Did you mean {path.parent}?")
    models = find_models(path)
    if not models:
        raise ConfigError(
            f"{path} is not a model folder of nnU-Net: it has neither plans.json nor dataset.json. Such a folder is "
            f"called TRAINER__PLANS__CONFIGURATION, as nnUNetTrainer__nnUNetPlans__3d_fullres, and has them beside its "
            f"folds."
        )
    lines = "".join(f"\n  model.folder={model}" for model in models[:8])
    more = f"\n  ... ({len(models)} in all)" if len(models) > 8 else ""
    raise ConfigError(f"{path} is not a model folder of nnU-Net, but holds some; choose one:{lines}{more}")
