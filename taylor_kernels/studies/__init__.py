"""Studies compare networks and criteria, and write a page about it: one folder a study.

`data`, `networks`, `training` and `weights` make the networks. `cache` keeps what is finished,
under keys that `digest` and `source_code` make. `results`, `report` and `plotting` write
result.json, the page and the plots. `settings`, `options` and `progress` stand between a study and
its user.

A module whose code decides a kept figure imports those of the page for type checking only.
"""
