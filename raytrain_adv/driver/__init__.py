"""What runs once, next to the cluster; the only part that imports ray."""

from raytrain_adv.errors import quieten

# Here, because this precedes the import of torch in every process of a run: the command, a trial's
# driver, and Ray's workers, whose logs Ray's dashboard shows.
quieten()
