"""What a traced program holds."""

from jax.extend import core


def equations(jaxpr, name):
  """Equations of a primitive, those inside of others included."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == name:
      yield equation
    for inner in core.jaxprs_in_params(equation.params):
      yield from equations(inner, name)
