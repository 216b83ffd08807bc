#!/usr/bin/env python3
"""Writes the seed inputs of fuzz_wire and fuzz_config: make_corpus.py (from the source tree's root).

Messages are written as text and turned into bytes by `protoc --encode`. Seeds of found defects are added
by hand under a name that says what they were.
"""
import pathlib
import subprocess

HERE = pathlib.Path(__file__).parent
SESSION = "000102030405060708090a0b0c0d0e0f"
ITEM = f'items {{ session_id: "{SESSION}" position: 70 n_tokens: 2 }}'

# In the order of fuzz_wire.c: byte 0 of the input is the index.
MESSAGES = [
    ("AttendRequest", {
        "decode": f'request_id: 7 layer: 3 {ITEM} dtype: DTYPE_BF16 q: "abcdefgh" k: "ijkl" v: "mnop"',
        "flags": f'request_id: 300 {ITEM} dtype: DTYPE_F32 causal: false want_lse: true append: false q: "abcd"',
        "items": f'{ITEM} {ITEM} {ITEM} dtype: DTYPE_F16 q: "a"',
        "bad_dtype": f'request_id: 5 {ITEM} q: "a"',
        "bad_session": 'request_id: 5 items { session_id: "xyz" n_tokens: 1 } dtype: DTYPE_F32',
    }),
    ("AttendResponse", {
        "ok": 'request_id: 7 timings { queue_us: 1 compute_us: 200 exchange_us: 30000 total_us: 40 } lse: "abcd" out: "efgh"',
        "failed": 'request_id: 7 status { code: 11 message: "position: given 9, expected at most 8" }',
    }),
    ("RegisterModelRequest", {
        "plain": 'spec { name: "m" n_layers: 2 n_q_heads: 8 n_kv_heads: 2 head_dim_qk: 64 kv_dtype: DTYPE_BF16 }',
        "policies": 'spec { name: "m" n_layers: 4 n_q_heads: 8 n_kv_heads: 2 head_dim_qk: 64 head_dim_v: 32 kv_dtype: DTYPE_F16 '
                    'softmax_scale: 0.1 logit_softcap: 30 policies { window { window_tokens: 128 sink_tokens: 4 } } '
                    'policies { layers: 1 layers: 3 dense {} } sharding { mode: CONTEXT shard_tokens: 128 max_ranks: 2 } }',
        "latent": 'spec { name: "m" n_layers: 1 n_q_heads: 8 n_kv_heads: 1 head_dim_qk: 64 kv_dtype: DTYPE_F32 kind: LATENT '
                  'latent_dim: 512 rope_dim: 64 latent_norm { mode: SLICE_RMS alpha: 1 alpha: 2 eps: 1e-6 } '
                  'policies { s2 { block_tokens: 64 local_blocks: 4 vert_stride: 8 head_sliding_step: -1 } } '
                  'sharding { mode: LATENT groups: 2 alpha: 1 mu: 0.5 } }',
    }),
    ("RegisterModelResponse", {"ok": 'model_id: "abc" warnings: "one" warnings: "two"'}),
    ("OpenSessionRequest", {"sharding": 'model_id: "abc" max_tokens_hint: 4096 sharding { mode: HEADS shard_tokens: 64 max_ranks: 3 }'}),
    ("OpenSessionResponse", {"ok": f'session_id: "{SESSION}"'}),
    ("ForkSessionRequest", {"at": f'session_id: "{SESSION}" at_position: 0', "all": f'session_id: "{SESSION}"'}),
    ("ForkSessionResponse", {"ok": f'session_id: "{SESSION}"'}),
    ("TruncateSessionRequest", {"ok": f'session_id: "{SESSION}" position: 99'}),
    ("CloseSessionRequest", {"ok": f'session_id: "{SESSION}"'}),
    ("GetSessionRequest", {"ok": f'session_id: "{SESSION}"'}),
    ("SessionInfo", {"ok": f'session_id: "{SESSION}" model_id: "abc" layer_tokens: 1 layer_tokens: 300 max_tokens: 300 kv_bytes: 65536 '
                           f'created_unix_ms: 1700000000000 parent_session_id: "{SESSION}"'}),
    ("ListSessionsRequest", {"ok": 'page_size: 10 page_token: "t" model_id: "abc"'}),
    ("ListSessionsResponse", {"ok": f'sessions {{ session_id: "{SESSION}" }} sessions {{ session_id: "{SESSION}" layer_tokens: 5 }} '
                                    'next_page_token: "t" n_total: 2'}),
    ("ClusterStatus", {"ok": 'version: "0.1.0" state: "serving" epoch: 1 uptime_ms: 5 ranks { rank: 1 host: "h" backend: "cpu" '
                             'device: "d" state: "ready" threads: 2 kv_bytes_total: 9 } listen: "127.0.0.1:7411" exchange: "mpi"'}),
    ("GetPlacementRequest", {"ok": f'session_id: "{SESSION}"'}),
    ("Placement", {"ok": f'session_id: "{SESSION}" model_id: "abc" mode: "heads" n_head_parts: 2 n_ctx_parts: 1 shard_tokens: 64 '
                         'shares { rank: 1 kv_head_end: 2 q_head_end: 8 ranges { begin: 0 end: 64 } n_tokens: 64 truncated: true } reason: "r"'}),
    ("WatchStatusRequest", {"ok": "interval_ms: 50", "bad": "interval_ms: 49"}),
    ("DrainRequest", {"ok": "timeout_ms: 1"}),
    ("DrainResponse", {"ok": "n_sessions: 1 n_requests_finished: 2"}),
]

CONFIGS = {
    "file_all": b"\0listen = a:1\nlisten = [::1]:2, unix:/p\nkv_memory = 50%\nthreads = 2\nbackend = cpu\nshard_tokens = 128\n",
    "file_comments": b"\0# c\n; c\n  threads = 3 ; c\n\nmessage_max: 1m\n",
    "file_section": b"\0[ranks]\nthreads = 1\n",
    "file_unknown": b"\0thread = 1\n",
    "file_no_value": b"\0threads\n",
    "file_long": b"\0threads = " + b"1" * 400 + b"\n",
    "env": b"\1FV_KV_MEMORY=512m\0FV_LISTEN=a:1,b:2\0FV_DEDICATED_COORDINATOR=yes",
    "args": b"\2--kv-memory=2g\0--listen\0unix:/x\0--dedicated-coordinator\0--isa=avx2\0--print-config",
    "args_help": b"\2--help\0--threads=x",
    "args_bad": b"\2--threads\0-5\0stray",
}

HASH = b"9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
TOKENS = {
    "one": b"alice user sha256=" + HASH + b"\n",
    "all": b"# who\n\na.b@c admin expires=2027-01-31T12:00:00Z kv_bytes=16g requests=4 bytes_per_second=1m sessions=3 sha256="
    + HASH + b"\n",
    "two": b"bob user sha256=" + HASH + b"\r\nbob user sha256=" + HASH[::-1] + b" expires=2027-01-31\n",
    "twice": b"a user sha256=" + HASH + b"\nb user sha256=" + HASH + b"\n",
    "differ": b"a user sha256=" + HASH + b"\na admin sha256=" + HASH[::-1] + b"\n",
    "token": b"a user fv_5eC\n",
    "token_as_hash": b"a user sha256=fv_5eC\n",
    "token_as_day": b'# who\n\na.b@c admin expires=2027-fv_5eC+\n01-31T12:00:00Z k',
    "token_as_name": b"fv_5eC+\n",
    "day": b"a user sha256=" + HASH + b" expires=2027-02-30\n",
    "zero": b"a user sha256=" + HASH + b" sessions=0\n",
    "nul": b"a user\0 sha256=" + HASH + b"\n",
    "long": b"a user " + b"x" * 600 + b"\n",
    "empty": b"\n",
}


def main():
    wire = HERE / "corpus_wire"
    config = HERE / "corpus_config"
    wire.mkdir(exist_ok=True)
    config.mkdir(exist_ok=True)
    for index, (name, texts) in enumerate(MESSAGES):
        for case, text in texts.items():
            data = subprocess.run(["protoc", f"--encode=fovea.v1.{name}", "proto/attention.proto"],
                                  input=text.encode(), stdout=subprocess.PIPE, check=True, cwd=HERE.parent.parent).stdout
            cuts = bytes([1, 2, 0, 9]) if index < 2 else b""
            (wire / f"{index:02d}_{name}_{case}").write_bytes(bytes([index]) + cuts + data)
    for case, data in CONFIGS.items():
        (config / case).write_bytes(data)
    token = HERE / "corpus_token"
    token.mkdir(exist_ok=True)
    for case, data in TOKENS.items():
        (token / case).write_bytes(data)


if __name__ == "__main__":
    main()
