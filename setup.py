"""What setup.cfg cannot say: an installed package holds a copy of configs/, which lies beside the packages."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Puts configs/ into the package `pipeline`, where `find_config` looks. An editable install reads the original."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        root = Path(__file__).parent
        for source in sorted((root / "configs").rglob("*.yaml")):
            target = Path(self.build_lib, "pipeline", source.relative_to(root))
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))


setup(cmdclass={"build_py": BuildWithConfigs})
