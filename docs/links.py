"""An extension of griffe, which reads the docstrings for the API pages."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):`([\w.]+)`")


class Links(griffe.Extension):
    """Link names in Sphinx's roles, and show what a package exports once: under the name that a user writes."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            link = r'<autoref optional identifier="\1"><code>\1</code></autoref>'  # plain where no page has it
            obj.docstring.value = ROLE.sub(link, obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for room in (module for module in pkg.modules.values() if module.is_subpackage):
            for name in room.exports or ():
                exported = room.members.get(str(name))
                if isinstance(exported, griffe.Alias):
                    exported.resolve_target()
                    exported.final_target.parent.del_member(exported.final_target.name)
