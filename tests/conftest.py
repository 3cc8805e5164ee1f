"""Where tests run in several processes: those of a file stay together, as they share what was costly to make; notebooks are dealt out one by one."""
import pytest


def pytest_collection_modifyitems(config, items):
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if item.path.name != "test_notebooks.py":
                item.add_marker(pytest.mark.xdist_group(item.path.stem))
