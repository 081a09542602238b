"""Where a run's artifacts lie: a folder a stage, a manifest in each, nothing half-written under a finished name.

A stage writes beside its place and is renamed when it is whole; the next one checks every byte before it starts:

>>> import tempfile
>>> from pathlib import Path
>>> from helpers.profiles import profile
>>> root = Path(tempfile.mkdtemp())
>>> with building(root / "prepare", "prepare", profile("tiny")) as stage:
...     _ = (stage.folder / "rows.txt").write_text("3 rows")
...     stage.measurements["rows"] = 3
>>> require(root / "prepare", "prepare")["measurements"]
{'rows': 3}
>>> _ = (root / "prepare" / "rows.txt").write_text("4 rows")
>>> require(root / "prepare", "prepare")  # doctest: +ELLIPSIS
Traceback (most recent call last):
helpers.workspace.whole.DamagedArtifact: .../prepare/rows.txt has another checksum than when it was written: ...

A rented machine's disk vanishes with it, so a run there has a second, lasting folder (Google Drive): finished stages
are copied to it, and a new machine fetches from it what it lacks.
"""

from helpers.workspace import files as files
from helpers.workspace.files import StorageError as StorageError
from helpers.workspace.files import checksum as checksum
from helpers.workspace.files import checksums as checksums
from helpers.workspace.files import existing as existing
from helpers.workspace.files import size_bytes as size_bytes
from helpers.workspace.files import write_text as write_text
from helpers.workspace.lasting import LASTING as LASTING
from helpers.workspace.lasting import copy_stage as copy_stage
from helpers.workspace.lasting import fetch as fetch
from helpers.workspace.lasting import keep_copy as keep_copy
from helpers.workspace.lasting import lasting_store as lasting_store
from helpers.workspace.lasting import lasting_twin as lasting_twin
from helpers.workspace.lasting import place as place
from helpers.workspace.runs import Workspace as Workspace
from helpers.workspace.runs import home as home
from helpers.workspace.runs import open_run as open_run
from helpers.workspace.runs import run_config as run_config
from helpers.workspace.runs import run_models as run_models
from helpers.workspace.stages import Building as Building
from helpers.workspace.stages import building as building
from helpers.workspace.stages import empty_folder as empty_folder
from helpers.workspace.stages import exclusive as exclusive
from helpers.workspace.stages import refuse_output as refuse_output
from helpers.workspace.stages import require as require
from helpers.workspace.versions import version_table as version_table
from helpers.workspace.whole import FINISHED as FINISHED
from helpers.workspace.whole import MANIFEST as MANIFEST
from helpers.workspace.whole import NOTEBOOKS as NOTEBOOKS
from helpers.workspace.whole import SCRATCH as SCRATCH
from helpers.workspace.whole import DamagedArtifact as DamagedArtifact
from helpers.workspace.whole import MissingArtifact as MissingArtifact
from helpers.workspace.whole import StaleArtifact as StaleArtifact
from helpers.workspace.whole import beside as beside
from helpers.workspace.whole import check_outputs as check_outputs
from helpers.workspace.whole import confined as confined
from helpers.workspace.whole import entries as entries
from helpers.workspace.whole import harm as harm
from helpers.workspace.whole import identify as identify
from helpers.workspace.whole import in_notebook as in_notebook
from helpers.workspace.whole import maker as maker
from helpers.workspace.whole import read_manifest as read_manifest
from helpers.workspace.whole import recover as recover
from helpers.workspace.whole import seal as seal
from helpers.workspace.whole import text_checksum as text_checksum
from helpers.workspace.whole import unseal as unseal
from helpers.workspace.whole import write_manifest as write_manifest
