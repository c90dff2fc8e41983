import sys; sys.path.insert(0,'/work/wt/few/tests')
import emulated_call, emulator, pytest, jax.numpy as jnp
from helpers import assert_bit_equal, make_exact_case
from jax_moe.kernels.sm90 import program
from jax_moe.kernels.sm90.specs import with_most_stages
def W(*a, **k): return with_most_stages((8,),*a,**k)
@pytest.mark.parametrize("form",[dict(x=(1,4,4,1),cluster=2),dict(x=(1,2,4,2),cluster=2)])
@pytest.mark.parametrize("tokens",[3,40])
def test_cluster(monkeypatch,tokens,form):
    config=W(*form["x"],by_warp=False,cluster=form["cluster"])
    monkeypatch.setattr(program, "best_config", lambda *_: config)
    for seed, (precision, combine) in enumerate((("w4a16", "atomic"), ("w4a4", "ordered"))):
        case = make_exact_case(
            seed, tokens=tokens, num_experts=4, top_k=2, hidden=576, intermediate=448, gated=False,
            precision=precision, combine=combine, out_dtype=jnp.float32,
        )
        expected = case.run()
        for order in emulator.ORDERS[1 + seed :]:
            call = emulated_call.prepare(case, "sm_90a", multiprocessors=4)
            gemms = [launch for launch in call.program.launches if launch.name.startswith("gemm")]
            assert [launch.spec.config for launch in gemms] == [config, config]
            assert_bit_equal(call.run(order=order, seed=seed), expected)
