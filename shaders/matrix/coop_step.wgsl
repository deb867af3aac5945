            // One step of forward_coop.wgsl: the tile of keys that begins at key j0.
            // Needs: the variables of the loop there; the next tile is the (n + $ahead)-th; $some_masked: whether some scores of the tile
            // may not count.
            // Gives: m, l, o; key_next and value_next, the next tile in registers; j0, the first key of the next tile.
            if BUFFERS == 1u {
                workgroupBarrier();
                store_key(key_next, 0u, thread);
                store_value(value_next, 0u, thread);
                workgroupBarrier();
            }
            let next = tile(visited, n + $ahead);
            key_next = load_key(at, u32(next), last, thread);
            value_next = load_value(at, u32(next), last, thread);

            // A tile's matrices of keys are taken in turns. A turn begins at key j_turn.
#unroll
            for (var turn = 0u; turn < TURNS; turn++) {
                let first = turn * ACROSS_TURN;
                let j_turn = j0 + i32(first * M);
                // What is added to scores, asked for ahead of the products that hide how long a bias takes to come
                var added = array<array<Lane, ACROSS_TURN>, ROW_MATRICES>();
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
                    for (var c = 0u; c < ACROSS_TURN; c++) {
                        added[r][c] = added_lane(at, i32(row0 + own_row + r * M), j_turn, c, lane);
                    }
                }

                // S = Q K^T
                var s = array<array<Accumulator, ACROSS_TURN>, ROW_MATRICES>();
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
                    for (var c = 0u; c < ACROSS_TURN; c++) {
                        s[r][c] = Accumulator();
                    }
                }
#unroll
                for (var d = 0u; d < Q_HELD; d++) {
#unroll
                    for (var c = 0u; c < ACROSS_TURN; c++) {
                        let place = buffer * D_SIZE + (first + c) * M * D_STRIDE + d * M / WIDTH;
                        let k = coopLoad<Right>(&tiles[place], D_STRIDE);
#unroll
                        for (var r = 0u; r < ROW_MATRICES; r++) {
                            s[r][c] = coopMultiplyAdd(q[r][d], k, s[r][c]);
                        }
                    }
                }
#if QUERY_IN_MEMORY
#unroll
                for (var d = 0u; d < Q_REST; d++) {
                    var q_rest = array<Left, ROW_MATRICES>();
#unroll
                    for (var r = 0u; r < ROW_MATRICES; r++) {
                        let place = REST_AT + (own_row + r * M) * REST_STRIDE + d * M / WIDTH;
                        q_rest[r] = coopLoadT<Left>(&tiles[place], REST_STRIDE);
                    }
#unroll
                    for (var c = 0u; c < ACROSS_TURN; c++) {
                        let place = buffer * D_SIZE + (first + c) * M * D_STRIDE + (Q_HELD + d) * M / WIDTH;
                        let k = coopLoad<Right>(&tiles[place], D_STRIDE);
#unroll
                        for (var r = 0u; r < ROW_MATRICES; r++) {
                            s[r][c] = coopMultiplyAdd(q_rest[r], k, s[r][c]);
                        }
                    }
                }
#endif
                var x = array<array<Lane, ACROSS_TURN>, ROW_MATRICES>();
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
                    for (var c = 0u; c < ACROSS_TURN; c++) {
                        x[r][c] = elements_of(s[r][c]);
                    }
                }

                // What each score is, and whether it counts
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
                    for (var c = 0u; c < ACROSS_TURN; c++) {
                        let i = i32(row0 + own_row + r * M);
                        let j = j_turn + i32(c * M);
                        x[r][c] = shaped(x[r][c], added[r][c], at, i, j, lane).score;
                        if $some_masked {
                            x[r][c] = masked(x[r][c], at, i, j, lane, masked_score);
                        }
                    }
                }

                // If the maximum of a row of the subgroup grew by more than GROWTH:  m' = max(m, rowmax S),  l = 2^(m - m') l,  O = 2^(m - m') O
                var turn_max = array<array<f32, LANE_ROWS>, ROW_MATRICES>();
                var grown = false;
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
                    for (var h = 0u; h < LANE_ROWS; h++) {
                        turn_max[r][h] = masked_score;
                    }
                    // The maximum of each element over the matrices first: short chains of dependent instructions.
                    var top = x[r][0];
#unroll
                    for (var c = 0u; c < ACROSS_TURN; c++) {
#unroll
                        for (var e = 0u; e < ELEMENTS; e++) {
                            top[e] = max(top[e], x[r][c][e]);
                        }
                    }
#unroll
                    for (var e = 0u; e < ELEMENTS; e++) {
                        turn_max[r][held_row(e)] = max(turn_max[r][held_row(e)], top[e]);
                    }
#unroll
                    for (var h = 0u; h < LANE_ROWS; h++) {
                        turn_max[r][h] = above(row_max(turn_max[r][h]) * factor);
                        grown = grown || turn_max[r][h] - m[r][h] > GROWTH;
                    }
                }
                // A loop of one trip at most: for an if, drivers copy O to other registers and back.
                for (var once = u32(subgroupAny(grown)); once > 0u; once--) {
#unroll
                    for (var r = 0u; r < ROW_MATRICES; r++) {
                        var shrink = array<f32, LANE_ROWS>();
#unroll
                        for (var h = 0u; h < LANE_ROWS; h++) {
                            let new_max = max(m[r][h], turn_max[r][h]);
                            shrink[h] = exp2(m[r][h] - new_max);
                            m[r][h] = new_max;
                            l[r][h] *= shrink[h];
                        }
#unroll
                        for (var d = 0u; d < ACROSS_DIM_V; d++) {
                            var y = elements_of(o[r][d]);
#unroll
                            for (var e = 0u; e < ELEMENTS; e++) {
                                y[e] *= shrink[held_row(e)];
                            }
                            o[r][d] = accumulator(y);
                        }
                    }
                }

                // P = 2^(S - m),  l = l + rowsum P
#unroll
                for (var r = 0u; r < ROW_MATRICES; r++) {
#unroll
                    for (var c = 0u; c < ACROSS_TURN; c++) {
#unroll
                        for (var e = 0u; e < ELEMENTS; e++) {
                            let p = exp2(fma(x[r][c][e], factor, -m[r][held_row(e)]));
                            x[r][c][e] = p;
                            l[r][held_row(e)] += p;
                        }
#if DROPOUT
                        let i = i32(row0 + own_row + r * M);
                        x[r][c] = what_is_kept(x[r][c], kept_lane(at, i, j_turn + i32(c * M), c, lane));
#endif
                    }
                }

                // O = O + P V
#unroll
                for (var c = 0u; c < ACROSS_TURN; c++) {
                    var p = array<Left, ROW_MATRICES>();
#unroll
                    for (var r = 0u; r < ROW_MATRICES; r++) {
                        p[r] = left(x[r][c]);
                    }
#unroll
                    for (var d = 0u; d < ACROSS_DIM_V; d++) {
                        let place = BUFFERS * D_SIZE + buffer * V_SIZE + (first + c) * M * V_STRIDE + d * M / WIDTH;
                        let v = coopLoadT<Right>(&tiles[place], V_STRIDE);
#unroll
                        for (var r = 0u; r < ROW_MATRICES; r++) {
                            o[r][d] = coopMultiplyAdd(p[r], v, o[r][d]);
                        }
                    }
                }
            }

            if BUFFERS == 2u {
                buffer = 1u - buffer;
                store_key(key_next, buffer, thread);
                store_value(value_next, buffer, thread);
                workgroupBarrier();
            }
            j0 = next;
